"""The data sets that train_gspo.py and validate_gspo.py use, and the rule-based rewards of their problems.

    python data_loader.py    an example of each data set, then the rewards of right, wrong and tricky answers

DATASETS has one entry per data set, which says everything about it. A new data set is a function that returns
problems and an entry in that table: docs/extending.md has an example. What a kind of problem pays for is
decided by REWARDS in gspo/tasks/rewards.py.

Train and eval never share a problem, whatever the counts and seeds: the side of a problem depends on its text
alone. The same seed gives the same problems in the same order on every machine.
"""

import random
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from gspo.tasks.files import load_gsm8k, load_jsonl
from gspo.tasks.generated import MAX_DRAWS, load_code, load_math, load_reasoning
from gspo.tasks.problem import Problem, shuffled, split_of
from gspo.tasks.rewards import (  # noqa: F401  the rewards are part of this module's interface
    RewardFunction,
    code_reward,
    compute_rewards,
    math_reward,
    require_sandbox,
)

SPLITS = ("train", "eval")
DIFFICULTIES = ("easy", "medium", "hard")
MIXTURE = {"math": 2, "code": 2, "reasoning": 1}  # shares of the data set "mixed"

Load = Callable[[str, int, int, str], list[Problem]]  # (split, num_samples, seed, difficulty)
LoadFile = Callable[[str, str, int, int], list[Problem]]  # (path, split, num_samples, seed)


@dataclass(frozen=True)
class Dataset:
    """One data set.

    rewards: the kinds of its problems, keys of gspo.tasks.rewards.REWARDS. load: returns num_samples problems
    of one split; None if the data set needs a path. load_file: does so with --dataset_path; None if the data
    set takes no path. max_new_tokens: difficulty -> tokens of a response, where the prompt asks for the
    answer alone; elsewhere a response may take what max_length leaves. needs_sandbox: what `load` returns
    cannot be graded without the code sandbox. examples: the difficulties of which the self-check shows a
    problem.
    """

    help: str
    rewards: tuple[str, ...]
    load: Load | None
    load_file: LoadFile | None = None
    max_new_tokens: dict[str, int] = field(default_factory=dict)
    needs_sandbox: bool = False
    examples: tuple[str, ...] = ("easy",)


def load_mixed(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Problems of several data sets, in the shares of MIXTURE."""
    problems: list[Problem] = []
    shares_so_far = 0
    for name, share in MIXTURE.items():
        shares_so_far += share
        count = round(num_samples * shares_so_far / sum(MIXTURE.values())) - len(problems)
        load = DATASETS[name].load
        if count and load:
            problems += load(split, count, seed, difficulty)
    return shuffled(problems, seed)


def load_sort(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Digits to sort, such as "3122=" with the answer "1223", for models with a vocabulary of characters."""
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < num_samples:
        digits = "".join(rng.choices("0123456789", k=rng.randint(12, 24)))
        if split_of(digits) == split:
            problems[digits] = Problem(f"sort-{digits}", "exact", f"{digits}=", "".join(sorted(digits)))
    return list(problems.values())


DATASETS = {
    "mixed": Dataset(
        "40 % math, 40 % code, 20 % reasoning",
        rewards=("math", "code", "reasoning"),
        load=load_mixed,
        load_file=load_jsonl,  # a path without --dataset is a file's
        max_new_tokens={"easy": 128},
        needs_sandbox=True,
        examples=(),
    ),
    "math": Dataset(
        "generated arithmetic and algebra",
        rewards=("math",),
        load=load_math,
        max_new_tokens={"easy": 32},
        examples=DIFFICULTIES,
    ),
    "code": Dataset(
        "generated Python functions to write, or a file of HumanEval or MBPP",
        rewards=("code",),
        load=load_code,
        load_file=load_jsonl,
        max_new_tokens={"easy": 128},
        needs_sandbox=True,
        examples=DIFFICULTIES,
    ),
    "reasoning": Dataset(
        "generated logic and tasks on strings",
        rewards=("reasoning",),
        load=load_reasoning,
        max_new_tokens={"easy": 32},
        examples=DIFFICULTIES,
    ),
    "gsm8k": Dataset(
        "openai/gsm8k from the hub, or a file in its format",
        rewards=("math",),
        load=load_gsm8k,
        load_file=load_jsonl,
        examples=(),
    ),
    "file": Dataset(
        "a jsonl file with question and answer (GSM8K's format), or one of HumanEval or MBPP",
        rewards=("math", "code"),
        load=None,
        load_file=load_jsonl,
        examples=(),
    ),
    "sort": Dataset(
        "12 to 24 digits to sort, for the tiny character models",
        rewards=("exact",),
        load=load_sort,
        max_new_tokens=dict.fromkeys(DIFFICULTIES, 32),
    ),
}


def load_problems(
    name: str, split: str, num_samples: int, seed: int = 0, difficulty: str = "easy", path: str | None = None
) -> list[Problem]:
    """num_samples problems of one side ("train" or "eval") of a data set. A path alone implies "file".

    ValueError, one line: an unknown name, split or difficulty; a broken file; more generated problems than
    exist. gsm8k and files give what they have, with a warning.
    """
    for what, given, known in (("data set", name, tuple(DATASETS)), ("split", split, SPLITS),
                               ("difficulty", difficulty, DIFFICULTIES)):  # fmt: skip
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    dataset = DATASETS[name]
    if path is not None:
        if dataset.load_file is None:
            raise ValueError(f"--dataset_path goes with --dataset {_names_with_path()}, not {name}")
        return dataset.load_file(path, split, num_samples, seed)
    if num_samples > MAX_DRAWS:
        raise ValueError(f"num_samples is {num_samples}; {MAX_DRAWS} are the most that are generated")
    if dataset.load is None:
        raise ValueError(f"the data set {name!r} needs --dataset_path PATH.jsonl")
    if dataset.needs_sandbox:
        require_sandbox()
    return dataset.load(split, num_samples, seed, difficulty)


def _names_with_path() -> str:
    *names, last = [name for name, dataset in DATASETS.items() if dataset.load_file]
    return f"{', '.join(names)} or {last}"


def default_max_new_tokens(name: str, difficulty: str) -> int | None:
    """Tokens of a response where the prompt asks for the answer alone; None: whatever max_length leaves."""
    return DATASETS[name].max_new_tokens.get(difficulty) if name in DATASETS else None


# Self-check

KNOWN_REWARDS = [  # (what it is, response, reference, reward)
    ("plain number", "17", "17", 1.0),
    ("wrong number", "18", "17", 0.0),
    ("carried out", "12 + 5 = 17", "17", 1.0),
    ("in words", "13 - 10 is 3.", "3", 1.0),
    ("not carried out", "12 + 5", "17", 0.0),
    ("division left", "\\boxed{84/7}", "12", 0.0),
    ("boxed", "So it is \\boxed{\\frac{1}{2}}.", "0.5", 1.0),
    ("after ####", "6 * 3 = 18\n#### $18.00", "18", 1.0),
    ("answer is", "The answer is **1,000** apples.", "1000", 1.0),
    ("percent", "50%", "50", 1.0),
    ("last number", "x = 3 and so 7 apples", "7", 1.0),
    ("mark beats last", "The answer is 7. I used 3 steps.", "3", 0.0),
    ("two candidates", "3 or 4", "4", 0.0),
    ("many candidates", "1 2 3 4 17", "17", 0.0),
    ("one per line", "15\n16\n17", "17", 0.0),
    ("two boxes", "\\boxed{3} \\boxed{4}", "4", 0.0),
    ("slashes", "17/18/19", "19", 0.0),
    ("an interval", "\\boxed{[3, 4]}", "4", 0.0),
    ("no number", "True", "1", 0.0),
    ("tower of powers", "9^9^9^9", "9", 0.0),
    ("nothing", "", "17", 0.0),
    ("equal roots", "\\boxed{\\sqrt{12}}", "2\\sqrt{3}", 1.0),
    ("pair", "#### (3, 4)", "(3, 4)", 1.0),
    ("pair swapped", "#### (4, 3)", "(3, 4)", 0.0),
]


KNOWN_CODE_REWARDS = [  # (what it is, code of double(x), which should return 2 * x; reward)
    ("right", "def double(x):\n    return x + x", 1.0),
    ("right, recursive", "def double(x):\n    return 2 + double(x - 1) if x else 0", 1.0),
    ("wrong", "def double(x):\n    return x * x", 0.0),
    ("a float", "def double(x):\n    return x * 2.0", 0.0),
    ("equals all", "class E(int):\n    __eq__ = lambda *a: True\ndouble = E", 0.0),
    ("exits with 0", "import sys\nsys.exit(0)", 0.0),
    ("forever", "def double(x):\n    while True: pass", 0.0),
    ("reads a file", "def double(x):\n    return open('/etc/hosts') and 2 * x", 0.0),
]
DOUBLE = {"entry_point": "double", "calls": [{"args": [x], "expected": 2 * x} for x in (0, 2, 21)]}


def main() -> int:
    """Print an example of each data set and a table of known rewards. Return 1 if a reward is off, else 0."""
    has_sandbox = True
    try:
        require_sandbox()
    except ValueError as error:
        print(f"Without code problems: {error}\n")
        has_sandbox = False
    for name, dataset in DATASETS.items():
        print(f"{name}: {dataset.help}\n")
        for difficulty in dataset.examples:
            if dataset.needs_sandbox and not has_sandbox:
                continue
            problem = load_problems(name, "train", 1, difficulty=difficulty)[0]
            print(f"{name}, {difficulty}\n{_indented(problem.prompt)}\n  ->\n{_indented(problem.answer)}\n")

    problems = [Problem(what, "math", "", reference) for what, _, reference, _ in KNOWN_REWARDS]
    rewards = compute_rewards(problems, [response for _, response, _, _ in KNOWN_REWARDS])
    table = [(*row, given) for row, given in zip(KNOWN_REWARDS, rewards, strict=True)]
    if has_sandbox:
        problems = [Problem(what, "code", "", "", {"tests": DOUBLE}) for what, _, _ in KNOWN_CODE_REWARDS]
        rewards = compute_rewards(problems, [f"```python\n{code}\n```" for _, code, _ in KNOWN_CODE_REWARDS])
        for (what, code, expected), given in zip(KNOWN_CODE_REWARDS, rewards, strict=True):
            table.append((what, code.replace("\n    ", " ").replace("\n", "; "), "2 * x", expected, given))

    print(f"{'Rewards':18} {'response':60} {'reference':11} {'expected':8} {'given':5}")
    for what, response, reference, expected, given in table:
        off = "" if given == expected else "  <- off"
        print(f"  {what:16} {response!r:60} {reference:11} {expected:8} {given!s:>5}{off}")
    num_off = sum(given != expected for *_, expected, given in table)
    print(f"{len(table) - num_off} of {len(table)} as expected")
    return 1 if num_off else 0


def _indented(text: str) -> str:
    wrapped = [textwrap.fill(line, 100, drop_whitespace=False) for line in text.strip().splitlines()]
    return textwrap.indent("\n".join(wrapped), "  ")


if __name__ == "__main__":
    sys.exit(main())
