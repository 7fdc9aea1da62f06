"""Problems of any of reasoning-gym's generators, with its own scorer: --dataset reasoning_gym:NAME."""

import ast
import difflib
import json
import warnings
from typing import Any

from gspo.tasks.problem import Problem, id_of, shuffled, split_of, stable_hash
from gspo.tasks.rewards import grade_answers, grading_job

# Draws for one problem: some repeat, and one problem in four is held out.
DRAWS_PER_PROBLEM, LEAST_DRAWS = 20, 5000
# Problems on which the scorer is tried when a generator is loaded.
NUM_TRIED = 3
# Texts that answer nothing.
EMPTY_ANSWERS = ("", "I do not know.")
# Generators whose problems are not the same in every process or on every day.
HASH_SEED = "depends on the hash seed of the process: a resumed run may not recognise its problems"
UNSTABLE = {
    "ransom_note": HASH_SEED,
    "isomorphic_strings": HASH_SEED,
    "time_intervals": "depends on today's date: another day brings other problems",
}
WARNING_STACK_LEVEL = 4  # the caller of load_problems


def load_generator(name: str, split: str, num_samples: int, seed: int, suffix: str) -> list[Problem]:
    """num_samples problems of a generator with its default settings.

    suffix: added to each question. A scorer that pays for nothing, or not for its own reference, is reported
    with a warning.

    ValueError: there is no such generator, it needs settings, or fewer different problems exist.
    """
    import reasoning_gym  # this import takes seconds
    from reasoning_gym.factory import DATASETS as GENERATORS

    if name not in GENERATORS:
        close = difflib.get_close_matches(name, GENERATORS, n=3) or sorted(GENERATORS)
        raise ValueError(f"reasoning-gym has no generator {name!r}; it has {', '.join(close)}")
    draws = max(LEAST_DRAWS, DRAWS_PER_PROBLEM * num_samples)  # some generators make all of them at once
    try:
        # A generator numbers its entries from its seed on: neighbouring seeds would give the same problems.
        entries = reasoning_gym.create_dataset(name, seed=stable_hash(seed, name) % 2**31, size=draws)
    except AssertionError as error:
        raise ValueError(f"reasoning_gym:{name} cannot be made with its default settings ({error})") from None
    problems: dict[str, Problem] = {}
    for index in range(draws):
        entry = entries[index]
        question = entry["question"].strip()
        if split_of(question) == split and question not in problems:
            metadata = {"generator": name, "entry": _literal(entry)}
            answer = entry["answer"] or ""
            problems[question] = Problem(
                f"{name}-{id_of(question)}", "generator", question + suffix, answer, metadata
            )
            if len(problems) == num_samples:
                break
    if len(problems) < num_samples:
        raise ValueError(
            f"reasoning_gym:{name} has {len(problems)} different problems for {split} among {draws}, and "
            f"{num_samples} were asked for: ask for fewer"
        )
    chosen = shuffled(list(problems.values()), seed)
    for remark in [UNSTABLE.get(name), *_remarks_on_scorer(chosen[:NUM_TRIED])]:
        if remark:
            warnings.warn(f"reasoning_gym:{name} {remark}", stacklevel=WARNING_STACK_LEVEL)
    return chosen


def _literal(entry: dict) -> str:
    """The entry as a Python literal: scorers tell tuples from lists, and JSON does not."""
    text = repr(entry)
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a date, say
        text = repr(json.loads(json.dumps(entry, default=str)))
    return text


def _remarks_on_scorer(problems: list[Problem]) -> list[str]:
    """Return remarks on what the scorer does wrong on these problems; each continues "The generator ..."."""

    def rewards_of(answers: list[str]) -> list[Any]:
        return grade_answers([grading_job(p, answer) for p, answer in zip(problems, answers, strict=True)])

    remarks = []
    references = rewards_of([f"#### {problem.answer}" for problem in problems])
    has_references = all(problem.answer for problem in problems)
    if has_references and min(reward or 0.0 for reward in references) < 1:
        remarks.append(f"pays its own reference answers {references}, and not 1 each")
    for text in EMPTY_ANSWERS:
        rewards = rewards_of([text] * len(problems))
        if any(rewards):
            remarks.append(
                f"pays {max(rewards)} for {text!r}: groups differ by how they say nothing, which is no signal"
            )
            break
    return remarks
