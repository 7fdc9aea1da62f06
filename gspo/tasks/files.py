"""Problems from files: GSM8K's format, HumanEval's and MBPP's, and GSM8K itself from the hub.

Every row is checked when it is read: a broken one is named with its place. The solutions that code problems
bring are run against their own tests before a problem is used.
"""

import gzip
import json
import warnings
import zlib
from pathlib import Path

from gspo import HUB_TIMEOUT_S
from gspo.tasks.code_benchmarks import code_problem
from gspo.tasks.code_families.family import shape_of
from gspo.tasks.generated import STEP_BY_STEP
from gspo.tasks.problem import Problem, id_of, shuffled, stable_hash
from gspo.tasks.rewards import grade_answers, grading_job, require_sandbox, run_all_tests

GSM8K = "openai/gsm8k"
EVAL_SHARE = 5  # the first fifth of a file, in hash order, is for evaluation
MAX_NAMED = 5  # problems that a message names
GZIP_MAGIC = b"\x1f\x8b"
WARNING_STACK_LEVEL = 4  # the caller of load_problems


def load_jsonl(path: str, split: str, num_samples: int, seed: int) -> list[Problem]:
    """Problems of one side of a jsonl or jsonl.gz file. ValueError: the file or a line of it is broken."""
    problems = _one_side(_read(Path(path)), split)
    return _sound_sample(problems, num_samples, seed, f"{path} ({split})")


def load_gsm8k(split: str, num_samples: int, seed: int, difficulty: str) -> list[Problem]:
    """Problems of GSM8K's own train or test split, from the hub. ValueError: the hub cannot be reached."""
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
    problems = _problems_of([(f"{GSM8K} {split} {n}", row) for n, row in enumerate(rows, start=1)])
    return _sound_sample(problems, num_samples, seed, f"gsm8k ({split})")


# Reading


def _read(path: Path) -> list[Problem]:
    """The problems of a file, without repeated questions."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"{path} is {what}; --dataset_path takes a jsonl file")
    content = path.read_bytes()
    try:
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            rows.append((place, _json_object(place, line)))
    problems = _problems_of(rows)
    # Of problems that differ in white space alone, the first stays.
    different = {" ".join(problem.prompt.split()): problem for problem in reversed(problems)}
    if len(different) < 2:
        raise ValueError(
            f"{path} has {len(different)} different problems; train and eval need at least one each"
        )
    return list(different.values())


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


def _problems_of(rows: list[tuple[str, dict]]) -> list[Problem]:
    """The problems of (place, row) pairs. ValueError with the place of a row that is broken."""
    problems = []
    for place, row in rows:
        try:
            code = code_problem(row)
            if code is None:
                problems.append(_question(row))
            else:
                problems.append(code.as_problem(f"task {row.get('task_id', place)}"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    _check_references([place for place, _ in rows], problems)
    return problems


def _question(row: dict) -> Problem:
    """A row in GSM8K's format. ValueError: it is not in that format."""
    for key in ("question", "answer"):
        if key not in row:
            raise ValueError(f"no field {key!r}")
        if not isinstance(row[key], str):
            raise ValueError(f"{key} is {type(row[key]).__name__}, not a string")
    question = row["question"].strip()
    reference = row["answer"].rpartition("####")[2].strip()
    if not question:
        raise ValueError("empty question")
    if not reference:
        raise ValueError("empty reference answer")
    return Problem(f"question-{id_of(question)}", "math", question + STEP_BY_STEP, reference)


def _check_references(places: list[str], problems: list[Problem]) -> None:
    """ValueError with the place of a math problem whose reference is no mathematical value."""
    from gspo.tasks.grading import reference_number  # compiles patterns, which only files need here

    unusual = [  # a number needs no further check, and the graders are slow for a whole file
        (place, problem)
        for place, problem in zip(places, problems, strict=True)
        if problem.kind == "math" and reference_number(problem.answer) is None
    ]
    rewards = grade_answers([grading_job(problem, "") for _, problem in unusual])
    for (place, _), reward in zip(unusual, rewards, strict=True):
        if not isinstance(reward, float):
            raise ValueError(f"{place}: {reward or 'the reference answer cannot be judged'}")


# Sides


def _one_side(problems: list[Problem], split: str) -> list[Problem]:
    """The problems of one side: eval has the first fifth in hash order."""
    contents = {problem.prompt: _content_hash(problem) for problem in problems}
    ordered = sorted(problems, key=lambda p: (contents[p.prompt], stable_hash(p.prompt)))
    hashes = [contents[problem.prompt] for problem in ordered]
    boundary = max(1, len(ordered) // EVAL_SHARE)
    while boundary < len(ordered) - 1 and hashes[boundary] == hashes[boundary - 1]:
        boundary += 1  # the boundary may not part problems of equal content
    return ordered[:boundary] if split == "eval" else ordered[boundary:]


def _content_hash(problem: Problem) -> int:
    """A hash that is equal for problems of equal content, which belong on one side.

    The content of a code problem is its solution, whatever the names in it; that of another is its prompt.
    """
    if problem.kind == "code":
        return stable_hash(shape_of(problem.answer))
    return stable_hash(" ".join(problem.prompt.split()))


# Code problems whose own solution passes


def _sound_sample(problems: list[Problem], num_samples: int, seed: int, source: str) -> list[Problem]:
    """num_samples of the problems, without code problems whose own solution fails their tests.

    Fewer, with a warning, where there are no more. ValueError: none is left.
    """
    candidates = shuffled(problems, seed)
    chosen: list[Problem] = []
    unsound: dict[str, str] = {}  # problem id -> status of its solution
    while candidates and len(chosen) < num_samples:
        count = num_samples - len(chosen)
        batch, candidates = candidates[:count], candidates[count:]
        for problem, status in zip(batch, _solution_statuses(batch), strict=True):
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
        warnings.warn(left_out, stacklevel=WARNING_STACK_LEVEL)
    if len(chosen) < num_samples:
        few = f"{source} has {len(chosen)} problems, {num_samples} were asked for"
        warnings.warn(few, stacklevel=WARNING_STACK_LEVEL)
    return chosen


def _solution_statuses(problems: list[Problem]) -> list[str]:
    """The sandbox's status for the own solution of each code problem; "pass" for other problems."""
    code = [problem for problem in problems if problem.kind == "code"]
    if not code:
        return ["pass"] * len(problems)
    require_sandbox()
    results = run_all_tests([(problem.answer, problem.metadata["tests"]) for problem in code])
    statuses = {}
    for problem, result in zip(code, results, strict=True):
        if result is None:
            raise ValueError(f"problem {problem.id}: the code sandbox failed on its own solution; try again")
        statuses[problem.prompt] = result.status
    return [statuses.get(problem.prompt, "pass") for problem in problems]
