"""Problems with checkable answers, and their rule-based rewards.

    python data_loader.py    an example of each data set, then the rewards of right, wrong and tricky answers

| name      | problems                                                       | reward                   |
|-----------|----------------------------------------------------------------|--------------------------|
| math      | reasoning-gym's arithmetic and algebra, easy / medium / hard   | final answer = reference |
| code      | functions to write, 86 families, easy / medium / hard          | all tests pass           |
| reasoning | reasoning-gym's logic and string tasks, easy / medium / hard   | reasoning-gym's scorer   |
| mixed     | all three, in the shares of MIXTURE                            | as above                 |
| gsm8k     | openai/gsm8k from the hub, or a file in its format             | as math                  |
| file      | a {"question": ..., "answer": ...} a line, answer after ####   | as math                  |
|           | or whole; or a line of HumanEval's or MBPP's files             | as code                  |
| sort      | 12 to 24 digits to be sorted, for the tiny character models    | equality                 |

Train and eval never share a problem, whatever the counts and seeds: which side a problem is on depends on its
text alone. The same seed gives the same problems in the same order on every machine.
"""

import gzip
import hashlib
import json
import random
import re
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo import HUB_TIMEOUT_S
from gspo.sandbox import SandboxError, check_machine
from gspo.tasks.code_benchmarks import code_problem
from gspo.tasks.code_families.easy import EASY
from gspo.tasks.code_families.family import CodeProblem, Family, instantiate, shape_of
from gspo.tasks.code_families.hard import HARD
from gspo.tasks.code_families.medium import MEDIUM
from gspo.tasks.grading import reference_number
from gspo.tasks.rewards import (  # noqa: F401  the rewards are part of this module's interface
    Problem,
    RewardFunction,
    code_reward,
    compute_rewards,
    grading_job,
    judge,
    math_reward,
    run_code,
)

EVAL_SHARE = 4  # one generated problem in four is for evaluation
FILE_EVAL_SHARE = 5  # the first fifth of a file, in hash order
MAX_DRAWS = 1_000_000  # draws from one generator
MAX_REPEATS = 1000  # draws in a row that bring nothing new: the generator has no more

DATASETS = ("mixed", "math", "code", "reasoning", "gsm8k", "file", "sort")
SPLITS = ("train", "eval")
DIFFICULTIES = ("easy", "medium", "hard")
MIXTURE = {"math": 2, "code": 2, "reasoning": 1}
FAMILIES = {"easy": EASY, "medium": MEDIUM, "hard": HARD}

GSM8K = "openai/gsm8k"
MAX_NAMED = 5  # problems, in a message
GZIP_MAGIC = b"\x1f\x8b"

NUMBER_ONLY = " Answer with only the final number."
YES_OR_NO = " Answer with only Yes or No."
STEP_BY_STEP = '\nReason step by step, then give the final answer alone after "####".'


@dataclass(frozen=True)
class Source:
    """One reasoning-gym generator at one level.

    question: the prompt, formatted with the entry's question and metadata. keep: which entries to use.
    """

    generator: str
    config: dict
    question: str = "{question}" + STEP_BY_STEP
    keep: Callable[[dict], bool] = lambda entry: True


def up_to_20(entry: dict) -> bool:
    operands = re.findall(r"\d+", entry["metadata"]["expression"])
    return int(entry["answer"]) >= 0 and all(int(operand) <= 20 for operand in operands)


WHAT_IS = "What is {expression}?"
WHAT_IS_EASY = WHAT_IS + NUMBER_ONLY
WHAT_IS_LONG = WHAT_IS + STEP_BY_STEP
COUNT_LETTERS = 'How many times does the letter "{target_letter}" appear in "{span[0]}"?'
# Not every generator will do: ransom_note and isomorphic_strings depend on Python's hash seed, time_intervals
# on today's date; countdown and color_cube_rotation pay 0.01 for any text, which a group's small std blows
# up, and spell_backward pays for a letter in the right place ("I do not know." has 1/3 for "ton");
# fraction_simplification, judged as math, would pay for the question itself.
SOURCES = {
    # Easy is for models of a hundred million parameters: SmolLM2-135M-Instruct, sampled, has some right.
    ("math", "easy"): [
        Source("chain_sum", dict(min_terms=2, max_terms=2, max_digits=1), WHAT_IS_EASY, up_to_20),
        Source("products", dict(max_digits=1), WHAT_IS_EASY),
        Source("chain_sum", dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2),
               WHAT_IS_EASY, up_to_20),
    ],
    ("math", "medium"): [
        Source("chain_sum", dict(min_terms=3, max_terms=5, min_digits=2, max_digits=3), WHAT_IS_LONG),
        Source("products", dict(min_digits=2, max_digits=2), WHAT_IS_LONG),
        Source("decimal_chain_sum", dict(max_terms=3, max_digits=2, max_decimal_places=2), WHAT_IS_LONG),
        Source("simple_equations", dict(max_terms=3, max_value=20)),
        Source("gcd", dict(max_value=200)),
        Source("lcm", dict(max_value=40)),
        Source("simple_geometry", dict(max_sides=4)),
    ],
    ("math", "hard"): [
        Source("basic_arithmetic", dict(min_terms=5, max_terms=8, min_digits=2, max_digits=3)),
        Source("products", dict(min_digits=3, max_digits=4), WHAT_IS_LONG),
        Source("simple_equations", dict(min_terms=4, max_terms=6, max_value=100)),
        Source("lcm", dict(min_numbers=3, max_numbers=3, min_value=10, max_value=200)),
        Source("gsm_symbolic", dict()),
        Source("count_primes", dict(max_n=400)),
        Source("dice", dict(num_dice=3, max_dice_size=10)),
    ],
    ("reasoning", "easy"): [
        Source("letter_counting", dict(min_words=1, max_words=1), COUNT_LETTERS + NUMBER_ONLY),
        Source("calendar_arithmetic", dict(tasks=["is_leap_year"]), "Is {year} a leap year?" + YES_OR_NO),
        Source("syllogism", dict(), "{premise1}. {premise2}. Does it follow that {conclusion}?" + YES_OR_NO),
    ],
    ("reasoning", "medium"): [
        Source("letter_counting", dict()),
        Source("syllogism", dict()),
        Source("family_relationships", dict()),
        Source("needle_haystack", dict(min_num_statements=5, max_num_statements=15)),
        Source("aiw", dict()),
        Source("word_sorting", dict(max_words=5)),
    ],
    ("reasoning", "hard"): [
        Source("knights_knaves", dict(n_people=3)),
        Source("zebra_puzzles", dict()),
        Source("self_reference", dict()),
        Source("course_schedule", dict()),
        Source("word_sorting", dict(min_words=8, max_words=12)),
        Source("caesar_cipher", dict(max_words=5)),
        Source("binary_alternation", dict()),
    ],
}  # fmt: skip


def load_problems(
    name: str, split: str, num_samples: int, seed: int = 0, difficulty: str = "easy", path: str | None = None
) -> list[Problem]:
    """num_samples problems of one side ("train" or "eval") of a data set. A path alone implies "file".

    ValueError, one line: an unknown name, split or difficulty; a broken file; more generated problems than
    exist. gsm8k and files give what they have, with a warning.
    """
    for what, given, known in (("data set", name, DATASETS), ("split", split, SPLITS),
                               ("difficulty", difficulty, DIFFICULTIES)):  # fmt: skip
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if num_samples > MAX_DRAWS and path is None:
        raise ValueError(f"num_samples is {num_samples}; {MAX_DRAWS} are the most that are generated")
    if path is None and name == "file":
        raise ValueError("the data set 'file' needs --dataset_path PATH.jsonl")
    if path is not None and name not in ("file", "gsm8k", "code", "mixed"):
        raise ValueError(f"--dataset_path goes with --dataset file, gsm8k or code, not {name}")
    if name in ("code", "mixed") and path is None:
        _require_sandbox()

    if path is not None:
        return _sample(_file_split(Path(path), split), num_samples, seed, f"{path} ({split})")
    if name == "gsm8k":
        return _sample(_gsm8k_split(split), num_samples, seed, f"gsm8k ({split})")
    if name == "sort":
        return _sort_problems(split, num_samples, seed)
    if name == "mixed":
        return _mixed(split, num_samples, seed, difficulty)
    return _generated(name, split, num_samples, seed, difficulty)


def default_max_new_tokens(name: str, difficulty: str) -> int | None:
    """Tokens of a response where the prompt asks for the answer alone; None: whatever max_length leaves."""
    if name == "sort":
        return 32
    return (
        {"math": 32, "reasoning": 32, "code": 128, "mixed": 128}.get(name) if difficulty == "easy" else None
    )


def _require_sandbox() -> None:
    try:
        check_machine()
    except SandboxError as error:
        raise ValueError(
            f"code problems cannot be judged here: {error}. --dataset math and reasoning need no sandbox"
        ) from error


# Generated problems


def _generated(name: str, split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    seen: set[str] = set()
    if name == "code":
        streams = [_family_stream(family, split, seed, difficulty) for family in FAMILIES[difficulty]]
    else:
        streams = [
            _source_stream(source, name, split, seed, difficulty, seen)
            for source in SOURCES[name, difficulty]
        ]
    # Few problems are of few kinds: by the seed, not always of the same ones.
    random.Random(_stable_hash(seed, name, split)).shuffle(streams)
    problems: list[Problem] = []
    while streams and len(problems) < num_samples:
        problems += [problem for stream in streams if (problem := next(stream, None))]
        streams = [stream for stream in streams if stream.gi_frame is not None]  # without the ones that ended
    if len(problems) < num_samples:
        raise ValueError(
            f"{name} has {len(problems)} different problems for {split} at difficulty {difficulty}, and "
            f"{num_samples} were asked for: ask for fewer, or for a higher difficulty"
        )
    return _shuffled(problems[:num_samples], seed)


def _family_stream(family: Family, split: str, seed: int, difficulty: str) -> Iterator[Problem]:
    """The family's problems of one side, in an order that the seed gives."""
    order = random.Random(_stable_hash(seed, family.signature)).sample(range(family.size), family.size)
    for index in order:
        problem = instantiate(family, index)
        if _split_of(problem.prompt) == split:
            yield _code_problem(problem, f"code-{difficulty}-{_stable_hash(problem.prompt) % 16**10:010x}")


def _code_problem(problem: CodeProblem, problem_id: str) -> Problem:
    metadata = {"tests": problem.tests, "preamble": problem.preamble}
    return Problem(problem_id, "code", problem.prompt, problem.solution, metadata)


def _source_stream(
    source: Source, name: str, split: str, seed: int, difficulty: str, seen: set[str]
) -> Iterator[Problem]:
    """The source's new problems of one side, until it has no more. seen: the prompts used so far."""
    import reasoning_gym  # a second of imports, for those who need it

    # A generator numbers its entries from its seed on, so neighbouring seeds would give overlapping problems.
    generator_seed = _stable_hash(seed, source.generator, source.config) % 2**31
    entries = reasoning_gym.create_dataset(
        source.generator, seed=generator_seed, size=MAX_DRAWS, **source.config
    )
    repeats = 0
    for index in range(MAX_DRAWS):
        entry = entries[index]
        prompt = source.question.format(
            question=entry["question"].strip(), **_without_question(entry["metadata"])
        )
        if not source.keep(entry) or _split_of(prompt) != split:
            continue
        repeats = repeats + 1 if prompt in seen else 0
        if repeats > MAX_REPEATS:
            return
        if repeats == 0:
            seen.add(prompt)
            kind, metadata = name, {"generator": source.generator}
            if kind == "reasoning":
                metadata["entry"] = json.loads(json.dumps(entry))
            problem_id = f"{name}-{difficulty}-{_stable_hash(prompt) % 16**10:010x}"
            yield Problem(problem_id, kind, prompt, entry["answer"], metadata)


def _without_question(metadata: dict) -> dict:
    return {key: value for key, value in metadata.items() if key != "question"}


def _mixed(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    problems, share_so_far = [], 0
    for name, share in MIXTURE.items():
        share_so_far += share
        count = round(num_samples * share_so_far / sum(MIXTURE.values())) - len(problems)
        problems += _generated(name, split, count, seed, difficulty) if count else []
    return _shuffled(problems, seed)


def _sort_problems(split: str, num_samples: int, seed: int) -> list[Problem]:
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < num_samples:
        digits = "".join(rng.choices("0123456789", k=rng.randint(12, 24)))
        if _split_of(digits) == split:
            problems[digits] = Problem(f"sort-{digits}", "exact", f"{digits}=", "".join(sorted(digits)))
    return list(problems.values())


def _stable_hash(*parts) -> int:
    """The same on every machine and in every process, which Python's hash() is not."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def _split_of(text: str) -> str:
    """Word order does not count, so that 3 + 4 and 4 + 3 are on the same side."""
    words = sorted(re.findall(r"\w+|[^\w\s]", text))
    return "eval" if _stable_hash(words) % EVAL_SHARE == 0 else "train"


def _shuffled(problems: list[Problem], seed: int) -> list[Problem]:
    return sorted(problems, key=lambda problem: _stable_hash(seed, problem.prompt))


# GSM8K and files in its format


def _sample(problems: list[Problem], num_samples: int, seed: int, source: str) -> list[Problem]:
    """num_samples of the problems, of those whose own reference passes their tests."""
    candidates, chosen, unsound = _shuffled(problems, seed), [], {}
    while candidates and len(chosen) < num_samples:
        count = num_samples - len(chosen)
        batch, candidates = candidates[:count], candidates[count:]
        for problem, status in zip(batch, _reference_statuses(batch), strict=True):
            if status == "pass":
                chosen.append(problem)
            else:
                unsound[problem.id] = status
    named = ", ".join(f"{name} ({status})" for name, status in [*unsound.items()][:MAX_NAMED])
    left_out = (
        f"{source}: left out {len(unsound)} problems whose own solution fails their tests in the sandbox "
        f"(where arguments and results must be plain data): {named}"
    )
    if not chosen:
        raise ValueError(left_out)
    if unsound:
        warnings.warn(left_out, stacklevel=3)
    if len(chosen) < num_samples:
        warnings.warn(f"{source} has {len(chosen)} problems, {num_samples} were asked for", stacklevel=3)
    return chosen


def _reference_statuses(problems: list[Problem]) -> list[str]:
    """What the sandbox says of the reference solutions of code problems; "pass" for the others."""
    code = [problem for problem in problems if problem.kind == "code"]
    if not code:
        return ["pass"] * len(problems)
    _require_sandbox()
    results = iter(run_code([(problem.answer, problem.metadata["tests"]) for problem in code]))
    statuses = []
    for problem in problems:
        result = next(results) if problem.kind == "code" else None
        if problem.kind == "code" and result is None:
            raise ValueError(f"problem {problem.id}: the code sandbox failed on its own solution; try again")
        statuses.append(result.status if result else "pass")
    return statuses


def _gsm8k_split(split: str) -> list[Problem]:
    import datasets
    import huggingface_hub

    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:  # where it is set, load_dataset asks only the cache
            huggingface_hub.HfApi().dataset_info(GSM8K, timeout=HUB_TIMEOUT_S)
        rows = datasets.load_dataset(GSM8K, "main", split="train" if split == "train" else "test")
    except Exception as error:
        raise ValueError(
            f"cannot load {GSM8K} from the hub ({type(error).__name__}); without network, give its jsonl "
            "file with --dataset_path PATH.jsonl"
        ) from error
    return _checked([(f"{GSM8K} {split} {n}", row) for n, row in enumerate(rows, start=1)])


def _file_split(path: Path, split: str) -> list[Problem]:
    """One side of a file. Repeated questions are dropped; the first fifth by hash is for evaluation."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"{path} is {what}; --dataset_path takes a jsonl file")
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content[:2] == GZIP_MAGIC else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from error
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    problems = _checked([(place, _json_object(place, line)) for place, line in lines])
    problems = list({" ".join(problem.prompt.split()): problem for problem in reversed(problems)}.values())
    if len(problems) < 2:
        raise ValueError(
            f"{path} has {len(problems)} different problems; train and eval need at least one each"
        )
    contents = {problem.prompt: _content_hash(problem) for problem in problems}
    problems.sort(key=lambda problem: (contents[problem.prompt], _stable_hash(problem.prompt)))
    boundary = max(1, len(problems) // FILE_EVAL_SHARE)
    while boundary < len(problems) - 1 and (
        contents[problems[boundary].prompt] == contents[problems[boundary - 1].prompt]
    ):
        boundary += 1
    return problems[:boundary] if split == "eval" else problems[boundary:]


def _content_hash(problem: Problem) -> int:
    """Equal for code problems with one solution, whatever its names: they belong on one side."""
    return _stable_hash(
        shape_of(problem.answer) if problem.kind == "code" else " ".join(problem.prompt.split())
    )


def _json_object(place: str, line: str) -> dict:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {type(row).__name__} instead of an object with question and answer")
    return row


def _checked(rows: list[tuple[str, dict]]) -> list[Problem]:
    """Problems of (place, row) pairs. ValueError with the place of a row that is not one."""
    problems = []
    for place, row in rows:
        try:
            code = code_problem(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if code is not None:
            problems.append(_code_problem(code, f"task {row.get('task_id', place)}"))
            continue
        for key in ("question", "answer"):
            if key not in row:
                raise ValueError(f"{place}: no field {key!r}")
            if not isinstance(row[key], str):
                raise ValueError(f"{place}: {key} is {type(row[key]).__name__}, not a string")
        question, reference = row["question"].strip(), row["answer"].rpartition("####")[2].strip()
        if not question or not reference:
            raise ValueError(f"{place}: empty {'reference answer' if question else 'question'}")
        problem_id = f"question-{_stable_hash(question) % 16**10:010x}"
        problems.append(Problem(problem_id, "math", question + STEP_BY_STEP, reference))
    pairs = zip(rows, problems, strict=True)
    unusual = [
        (place, problem)
        for (place, _), problem in pairs
        if problem.kind == "math" and reference_number(problem.answer) is None
    ]
    verdicts = judge([grading_job(problem, "") for _, problem in unusual])
    for (place, _), verdict in zip(unusual, verdicts, strict=True):
        if not isinstance(verdict, float):
            raise ValueError(f"{place}: {verdict or 'the reference answer cannot be judged'}")
    return problems


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
    ("one a line", "15\n16\n17", "17", 0.0),
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


KNOWN_CODE_REWARDS = [  # (what it is, code of double(x), which is to return 2 * x; reward)
    ("right", "def double(x):\n    return x + x", 1.0),
    ("right, recursive", "def double(x):\n    return 2 + double(x - 1) if x else 0", 1.0),
    ("wrong", "def double(x):\n    return x * x", 0.0),
    ("a float", "def double(x):\n    return x * 2.0", 0.0),
    ("equals all", "class E(int):\n    __eq__ = lambda *a: True\ndouble = E", 0.0),
    ("exits with 0", "import sys\nsys.exit(0)", 0.0),
    ("for ever", "def double(x):\n    while True: pass", 0.0),
    ("reads a file", "def double(x):\n    return open('/etc/hosts') and 2 * x", 0.0),
]
DOUBLE = {"entry_point": "double", "calls": [{"args": [x], "expected": 2 * x} for x in (0, 2, 21)]}


def main() -> int:
    code_sets, code_rewards = [("code", level) for level in FAMILIES], KNOWN_CODE_REWARDS
    try:
        _require_sandbox()
    except ValueError as error:
        print(f"Without code problems: {error}\n")
        code_sets, code_rewards = [], []
    for name, difficulty in [*SOURCES, *code_sets, ("sort", "easy")]:
        problem = load_problems(name, "train", 1, difficulty=difficulty)[0]
        print(f"{name}, {difficulty}\n{_indented(problem.prompt)}\n  ->\n{_indented(problem.answer)}\n")
    print(
        f"mixed: {', '.join(f'{share} {name}' for name, share in MIXTURE.items())} of {sum(MIXTURE.values())}"
    )
    print(f"gsm8k: {GSM8K} from the hub, or its jsonl file with --dataset_path")
    print(
        'file: {"question": "...", "answer": "... #### 17"} a line, HumanEval or MBPP, with --dataset_path\n'
    )

    problems = [Problem(what, "math", "", reference) for what, _, reference, _ in KNOWN_REWARDS]
    rewards = compute_rewards(problems, [response for _, response, _, _ in KNOWN_REWARDS])
    table = [(*row, given) for row, given in zip(KNOWN_REWARDS, rewards, strict=True)]
    problems = [Problem(what, "code", "", "", {"tests": DOUBLE}) for what, _, _ in code_rewards]
    rewards = compute_rewards(problems, [f"```python\n{code}\n```" for _, code, _ in code_rewards])
    for (what, code, expected), given in zip(code_rewards, rewards, strict=True):
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
