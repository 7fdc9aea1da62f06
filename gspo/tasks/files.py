"""Problems from a user's own data: questions with answers, HumanEval's and MBPP's rows, GSM8K from the hub.

Every row is checked when it is read: a broken one is named with its place. The solutions that code problems
bring are run against their own tests before a problem is used.
"""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gspo.tasks.code_benchmarks import code_problem
from gspo.tasks.code_families.family import shape_of
from gspo.tasks.generated import STEP_BY_STEP
from gspo.tasks.problem import Problem, id_of, shuffled, stable_hash
from gspo.tasks.rewards import grade_answers, grading_job, require_sandbox, run_all_tests
from gspo.tasks.rows import Rows, hub_rows, read_rows

# The columns in which a question is looked for, if --prompt_column does not name one.
PROMPT_COLUMNS = ("question", "prompt", "problem")
ANSWER_COLUMN = "answer"
EVAL_SHARE = 5  # the first fifth of a file, in hash order, is for evaluation
MAX_NAMED = 5  # problems that a message names
WARNING_STACK_LEVEL = 4  # the caller of load_problems


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a user's own data become problems.

    prompt_column: default, the first of PROMPT_COLUMNS that a row has. answer_column: default, ANSWER_COLUMN.
    prompt_suffix: what is added to each question; None: STEP_BY_STEP, or nothing for a reward of one's own.
    own_reward: a reward of one's own judges the responses, so a row needs no answer, and code no tests.
    eval_path: a file of held-out problems; None: a fifth of the rows is held out, or the hub's own split.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    prompt_suffix: str | None = None
    own_reward: bool = False
    eval_path: str | None = None

    @property
    def suffix(self) -> str:
        if self.prompt_suffix is not None:
            return self.prompt_suffix
        return "" if self.own_reward else STEP_BY_STEP


def load_file(path: str, split: str, num_samples: int, seed: int, form: RowFormat) -> list[Problem]:
    """Problems of one side of a file. ValueError: the file or a row of it is broken."""
    problems = _problems_of(read_rows(Path(path)), form)
    side = _side(problems, None, split, path, form)
    chosen = _sound_sample(side, num_samples, seed, f"{path} ({split})")
    return [_with_suffix(problem, form.suffix) for problem in chosen]


def load_hub(name: str, split: str, num_samples: int, seed: int, form: RowFormat) -> list[Problem]:
    """Problems of one side of a data set on the hub (hub_rows). ValueError: it cannot be loaded or used."""
    rows, held_out_rows = hub_rows(name)
    problems = _problems_of(rows, form)
    held_out = _problems_of(held_out_rows, form) if held_out_rows is not None else None
    side = _side(problems, held_out, split, name, form)
    chosen = _sound_sample(side, num_samples, seed, f"{name} ({split})")
    return [_with_suffix(problem, form.suffix) for problem in chosen]


# Rows


def _problems_of(rows: Rows, form: RowFormat) -> list[Problem]:
    """The problems of rows, without repeated questions. ValueError with the place of a row that is broken."""
    problems = []
    for place, row in rows:
        try:
            is_question = form.own_reward or form.prompt_column is not None
            code = None if is_question else code_problem(row)
            if code is None:
                problems.append(_question(row, form))
            else:
                problems.append(code.as_problem(f"task {row.get('task_id', place)}"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not form.own_reward:
        problems = _with_kinds([place for place, _ in rows], problems)
    # Problems that differ in white space alone count as one, and the first of them stays.
    different = {" ".join(problem.text.split()): problem for problem in reversed(problems)}
    if len(different) < len(problems):
        repeated = (
            f"{len(problems) - len(different)} of {len(problems)} rows repeat a question and are left out"
        )
        warnings.warn(f"{rows[0][0]} and on: {repeated}", stacklevel=WARNING_STACK_LEVEL)
    return list(different.values())


def _question(row: dict, form: RowFormat) -> Problem:
    """A row with a question and, if it needs one, an answer. ValueError: it has not."""
    column = form.prompt_column or next((name for name in PROMPT_COLUMNS if name in row), PROMPT_COLUMNS[0])
    if column not in row:
        raise ValueError(f"no field {column!r} among {_named(row)}; name the prompt's with --prompt_column")
    prompt = _prompt(column, row[column])
    reference = _reference(row, form)
    problem = Problem("", "math", prompt, reference, {"columns": row})
    return Problem(f"question-{id_of(problem.text)}", "math", prompt, reference, {"columns": row})


def _named(row: dict) -> str:
    return ", ".join(map(repr, list(row)[:MAX_NAMED])) or "no fields"


def _prompt(column: str, value: Any) -> str | list[dict]:
    """A question or chat messages. ValueError: it is neither."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"empty {column}")
        return value.strip()
    if not isinstance(value, list):
        raise ValueError(f"{column} is {type(value).__name__}, not a string or a list of chat messages")
    for message in value:
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{column} has a message that is not {{"role": "...", "content": "..."}}')
    if not value or value[-1]["role"] == "assistant":
        raise ValueError(f"{column} must end with a message that the model is to answer")
    return value


def _with_suffix(problem: Problem, suffix: str) -> Problem:
    """The problem with the suffix after its question. Added last, it decides no side and no order."""
    if problem.kind == "code":
        return problem
    prompt = problem.prompt
    if isinstance(prompt, str):
        return replace(problem, prompt=prompt + suffix)
    return replace(problem, prompt=[*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + suffix}])


def _reference(row: dict, form: RowFormat) -> str:
    """The reference answer as text: what follows the last "####", or the whole; "" for a row without one."""
    column = form.answer_column or ANSWER_COLUMN
    value = row.get(column)
    if value is None and form.own_reward and form.answer_column is None:
        return ""
    if column not in row:
        raise ValueError(
            f"no field {column!r} among {_named(row)}; name the answer's with --answer_column, or give a "
            "--reward"
        )
    if isinstance(value, str):
        reference = value.rpartition("####")[2].strip()
        if not reference and not form.own_reward:
            raise ValueError("empty reference answer")
        return reference
    if isinstance(value, int | float):
        return str(value)
    if form.own_reward:
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{column} is {type(value).__name__}, not text or a number")


def _with_kinds(places: list[str], problems: list[Problem]) -> list[Problem]:
    """The problems with questions whose answers are text as kind "text", if most answers are.

    Raises:
        ValueError: most answers are mathematical values, and one is not. The message has its place.
    """
    from gspo.tasks.grading import reference_number  # compiles patterns, which only files need here

    unusual = [  # a number needs no further check, and the graders are slow for a whole file
        (place, problem)
        for place, problem in zip(places, problems, strict=True)
        if problem.kind == "math" and reference_number(problem.answer) is None
    ]
    rewards = grade_answers([grading_job(problem, "") for _, problem in unusual])
    texts = [
        (place, reward)
        for (place, _), reward in zip(unusual, rewards, strict=True)
        if not isinstance(reward, float)
    ]
    num_questions = sum(problem.kind == "math" for problem in problems)
    if not texts:
        return problems
    if 2 * len(texts) <= num_questions:
        place, reward = texts[0]
        raise ValueError(f"{place}: {reward or 'the reference answer cannot be judged'}")
    return [replace(problem, kind="text") if problem.kind == "math" else problem for problem in problems]


# Sides


def _side(
    problems: list[Problem], held_out: list[Problem] | None, split: str, source: str, form: RowFormat
) -> list[Problem]:
    """The problems of one side: all of each if some are held out, else eval has a fifth of them.

    A problem that is held out as well is not trained on, and counted.
    """
    if form.eval_path is not None:
        held_out = _problems_of(read_rows(Path(form.eval_path)), form)
        source = f"{source} and {form.eval_path}"
    if held_out is None:
        if len(problems) < 2:
            raise ValueError(
                f"{source} has {len(problems)} different problems; train and eval need at least one each"
            )
        return _one_side(problems, split)
    contents = {_content_hash(problem) for problem in held_out}
    training = [problem for problem in problems if _content_hash(problem) not in contents]
    if not training or not held_out:
        raise ValueError(
            f"{source}: {len(training)} problems to train on that are not held out, {len(held_out)} held "
            "out; both need at least one"
        )
    if split == "train" and len(training) < len(problems):
        both = f"{source}: {len(problems) - len(training)} problems are held out as well, and not trained on"
        warnings.warn(both, stacklevel=WARNING_STACK_LEVEL)
    return held_out if split == "eval" else training


def _one_side(problems: list[Problem], split: str) -> list[Problem]:
    """The problems of one side: eval has the first fifth in hash order."""
    contents = {problem.text: _content_hash(problem) for problem in problems}
    ordered = sorted(problems, key=lambda p: (contents[p.text], stable_hash(p.text)))
    hashes = [contents[problem.text] for problem in ordered]
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
    return stable_hash(" ".join(problem.text.split()))


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
        statuses[problem.text] = result.status
    return [statuses.get(problem.text, "pass") for problem in problems]
