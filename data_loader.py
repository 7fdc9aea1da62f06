"""The data sets that train_gspo.py and validate_gspo.py use, and the rule-based rewards of their problems.

    python data_loader.py    an example of each data set, then the rewards of right, wrong and tricky answers
    python data_loader.py --dataset_path tasks.jsonl --reward my_rewards.py:score
                             prompts of one task; what its reference answers earn, and empty ones

DATASETS has one entry per data set, which says everything about it. A new data set is a function that returns
problems and an entry in that table: docs/extending.md has an example. What a kind of problem pays for is
decided by REWARDS in gspo/tasks/rewards.py, or by a reward of one's own (reward_function).

Train and eval never share a problem, whatever the counts and seeds: the side of a problem depends on its text
alone. The same seed gives the same problems in the same order on every machine.
"""

import argparse
import math
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gspo.tasks.files import RowFormat, load_file, load_hub
from gspo.tasks.generated import MAX_DRAWS, load_code, load_math, load_reasoning
from gspo.tasks.generators import load_generator
from gspo.tasks.own_reward import OwnReward
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

# --dataset reasoning_gym:NAME and --dataset OWNER/NAME or OWNER/NAME:CONFIGURATION
GENERATOR_PREFIX = "reasoning_gym:"
QUESTION_AND_ANSWER = RowFormat()
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

RewardsOf = Callable[[list[Problem], list[str]], Sequence[float | dict[str, float] | None]]
Load = Callable[[str, int, int, str], list[Problem]]  # (split, num_samples, seed, difficulty)


@dataclass(frozen=True)
class Dataset:
    """One data set.

    rewards: the kinds of its problems, keys of gspo.tasks.rewards.REWARDS. load: returns num_samples problems
    of one split; None if they come from elsewhere. takes_path: whether it goes with --dataset_path. hub: its
    name on the hub, with the configuration. max_new_tokens: difficulty -> tokens of a response, where the
    prompt asks for the answer alone; elsewhere a response may take what max_length leaves. needs_sandbox:
    what `load` returns cannot be graded without the code sandbox. examples: the difficulties of which the
    self-check shows a problem.
    """

    help: str
    rewards: tuple[str, ...]
    load: Load | None
    takes_path: bool = False
    hub: str | None = None
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
        takes_path=True,  # a path without --dataset is a file's
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
        takes_path=True,
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
        load=None,
        takes_path=True,
        hub="openai/gsm8k:main",
        examples=(),
    ),
    "file": Dataset(
        "a jsonl, csv or parquet file with question and answer, or a jsonl file of HumanEval or MBPP",
        rewards=("math", "text", "code"),
        load=None,
        takes_path=True,
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
    name: str,
    split: str,
    num_samples: int,
    seed: int = 0,
    difficulty: str = "easy",
    path: str | None = None,
    form: RowFormat = QUESTION_AND_ANSWER,
) -> list[Problem]:
    """num_samples problems of one side ("train" or "eval") of a data set. A path alone implies "file".

    name: a key of DATASETS, OWNER/NAME of a data set on the hub, or reasoning_gym:NAME for one of its
    generators. form: how the rows of a file or of the hub become problems.

    ValueError, one line: an unknown name, split or difficulty; a broken file; more generated problems than
    exist. The hub and files give what they have, with a warning.
    """
    dataset = dataset_named(name)
    for what, given, known in (("split", split, SPLITS), ("difficulty", difficulty, DIFFICULTIES)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if path is not None:
        if not dataset.takes_path:
            raise ValueError(f"--dataset_path goes with --dataset {_names_with_path()}, not {name}")
        return load_file(path, split, num_samples, seed, form)
    if dataset.hub is not None:
        return load_hub(dataset.hub, split, num_samples, seed, form)
    if num_samples > MAX_DRAWS:
        raise ValueError(f"num_samples is {num_samples}; {MAX_DRAWS} are the most that are generated")
    if name.startswith(GENERATOR_PREFIX):
        generator = name.removeprefix(GENERATOR_PREFIX)
        return load_generator(generator, split, num_samples, seed, form.suffix)
    if dataset.load is None:
        raise ValueError(f"the data set {name!r} needs --dataset_path PATH.jsonl")
    if replace(form, own_reward=False) != QUESTION_AND_ANSWER:
        raise ValueError(
            "--prompt_column, --answer_column, --prompt_suffix and --eval_path go with data of your own, "
            f"from --dataset_path or from the hub, not with --dataset {name}"
        )
    if dataset.needs_sandbox:
        require_sandbox()
    return dataset.load(split, num_samples, seed, difficulty)


def dataset_named(name: str) -> Dataset:
    """The data set that a name stands for. ValueError: there is none."""
    if name in DATASETS:
        return DATASETS[name]
    if name.startswith(GENERATOR_PREFIX):
        return Dataset("one of reasoning-gym's generators", rewards=("generator",), load=None)
    if HUB_NAME.fullmatch(name):
        return Dataset("a data set on the hub", rewards=("math", "text", "code"), load=None, hub=name)
    raise ValueError(
        f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}, OWNER/NAME on the hub, or "
        "reasoning_gym:NAME"
    )


def reward_function(own_reward: str | None = None, code_mode: str = "all") -> RewardsOf:
    """Return the function that rewards responses to problems, as a trainer takes it.

    own_reward: FILE.py:FUNCTION, a reward of one's own (gspo/tasks/own_reward.py); None: that of each
    problem's kind. code_mode: as RewardFunction's code_reward.

    ValueError: the file or its function cannot be had.
    """
    return RewardFunction(code_mode) if own_reward is None else OwnReward(own_reward)


def _names_with_path() -> str:
    *names, last = [name for name, dataset in DATASETS.items() if dataset.takes_path]
    return f"{', '.join(names)} or {last}"


def default_max_new_tokens(name: str, difficulty: str) -> int | None:
    """Tokens of a response where the prompt asks for the answer alone; None: whatever max_length leaves."""
    return DATASETS[name].max_new_tokens.get(difficulty) if name in DATASETS else None


# The commands

NUM_SHOWN, NUM_REWARDED = 2, 20  # problems

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


def main(arguments: list[str] | None = None) -> int:
    """The self-check, or with flags show_task(). Returns the exit code."""
    flags = parse(arguments)
    if flags == parse([]):
        return check_rewards()
    columns = flags.prompt_column, flags.answer_column, flags.prompt_suffix
    form = RowFormat(*columns, flags.reward is not None, flags.eval_path)
    settings = flags.data_seed, flags.difficulty, flags.dataset_path, form
    try:
        with warnings.catch_warnings(action="ignore"):  # fewer problems than asked for
            problems = load_problems(flags.dataset, "train", NUM_REWARDED, *settings)
        return show_task(problems, reward_function(flags.reward, flags.code_reward), flags.system_prompt)
    except (ValueError, OSError) as error:
        print(f"data_loader.py: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python data_loader.py",
        description="Without flags: an example of each data set, and the rewards of known answers. With "
        "flags, which are those of train_gspo.py: the prompts of one task, and what it pays for.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", default="file")
    parser.add_argument("--difficulty", default="easy")
    parser.add_argument("--code_reward", default="all")
    parser.add_argument("--data_seed", type=int, default=0)
    for name in ("dataset_path", "reward", "prompt_column", "answer_column", "prompt_suffix", "eval_path",
                 "system_prompt"):  # fmt: skip
        parser.add_argument(f"--{name}")
    return parser.parse_args(arguments)


def show_task(problems: list[Problem], rewards_of: RewardsOf, system_prompt: str | None) -> int:
    """Print prompts of a task, and what its reference answers earn, an empty text and a copy of the prompt.

    Returns 1 if a text that answers nothing earns as much as the reference answers, or if no reward tells.
    """
    for problem in problems[:NUM_SHOWN]:
        _show_prompt(problem, system_prompt)
    code = [f"```python\n{problem.answer}\n```" for problem in problems]
    references = [c if p.kind == "code" else p.answer for p, c in zip(problems, code, strict=True)]
    has_references = all(problem.answer for problem in problems)
    responses_by_kind = {
        **({"the reference answer": references} if has_references else {}),
        "an empty text": [""] * len(problems),
        "a copy of the prompt": [problem.text for problem in problems],
    }
    print(f"Rewards of {len(problems)} problems {'mean':>13} {'lowest':>8} {'highest':>8} {'not judged':>11}")
    means: list[float] = []
    references_rewards: list[float | None] = []  # or those of the first row, if there are no references
    for what, responses in responses_by_kind.items():
        rewards = [
            sum(earned.values()) if isinstance(earned, dict) else earned
            for earned in rewards_of(problems, responses)
        ]
        references_rewards = references_rewards or rewards
        judged = [reward for reward in rewards if reward is not None] or [math.nan]
        means.append(sum(judged) / len(judged))
        figures = " ".join(f"{figure:8.3f}" for figure in (means[-1], min(judged), max(judged)))
        print(f"  {what:28} {figures} {rewards.count(None):11}")
    if None in references_rewards:
        print(
            f"{references_rewards.count(None)} of the responses were not judged: mend that before training."
        )
        return 1
    if not has_references or means[0] > max(means[1:]):
        return 0
    print("The reference answers do not earn more than texts that answer nothing.")
    return 1


def _show_prompt(problem: Problem, system_prompt: str | None) -> None:
    messages = [{"role": "user", "content": problem.text}]
    if not isinstance(problem.prompt, str):
        messages = problem.prompt
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    print(f"{problem.id}\n")
    for message in messages:
        print(f"  {message['role']}\n{textwrap.indent(_indented(message['content']), '  ')}\n")
    print(f"  reference answer\n{textwrap.indent(_indented(problem.answer), '  ')}\n")


def check_rewards() -> int:
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
            print(f"{name}, {difficulty}\n{_indented(problem.text)}\n  ->\n{_indented(problem.answer)}\n")

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
