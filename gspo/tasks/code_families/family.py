"""Families of function-writing problems: a task with parameters, a reference solution, random tests.

The families themselves stand in easy.py, medium.py and hard.py. A family's texts are string.Template sources:
$name is replaced by a parameter's value, so every combination of values is another problem. `instantiate`
makes one. Its tests are drawn from a seed that depends on its own text, so they are the same on every
machine, and no two problems share them.
"""

import ast
import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from string import Template
from types import SimpleNamespace
from typing import Any

from gspo.tasks.problem import Problem

NUM_CALLS = 12  # calls per problem, the edge cases among them
NUM_EXAMPLES = 2  # calls shown in the prompt, none of which is a test
MAX_DRAWS = 500  # of arguments, before too few different ones means that the family is too small
TOPICS = ("strings", "lists", "numbers", "dictionaries", "recursion", "simulation", "parsing")


@dataclass(frozen=True)
class Family:
    """Function-writing problems that differ in their parameters.

    signature: "name(argument, ...)"; the name is the family's own. task: completes "that ...", and says
    exactly what is returned, of which type, and what happens for empty input. solution: source that defines
    the function. draw(rng, p): the arguments of one random call, as plain JSON data (numbers, strings,
    booleans, None, lists, dictionaries with string keys). edges(p): argument lists of the cases that wrong
    solutions miss. parameters: each one's values; p has them as attributes.
    """

    topic: str
    signature: str
    task: str
    solution: str
    draw: Callable[[random.Random, SimpleNamespace], list]
    edges: Callable[[SimpleNamespace], list[list]]
    parameters: dict[str, Sequence] = field(default_factory=dict)

    @property
    def entry_point(self) -> str:
        return self.signature.partition("(")[0]

    @property
    def size(self) -> int:
        """Number of combinations of parameters."""
        return math.prod(len(values) for values in self.parameters.values())

    def values(self, index: int) -> dict:
        """The combination of parameters number `index`, from 0 to size - 1."""
        chosen = {}
        for name, choices in self.parameters.items():
            index, choice = divmod(index, len(choices))
            chosen[name] = choices[choice]
        return chosen


@dataclass(frozen=True)
class CodeProblem:
    """prompt: the user's message. solution: the reference's source. tests: for gspo.sandbox.run_tests.

    preamble: source that goes before the code of an answer, such as imports that the prompt shows.
    """

    prompt: str
    solution: str
    tests: dict
    preamble: str = ""

    def as_problem(self, problem_id: str) -> Problem:
        metadata = {"tests": self.tests, "preamble": self.preamble}
        return Problem(problem_id, "code", self.prompt, self.solution, metadata)


def instantiate(family: Family, index: int) -> CodeProblem:
    """The family's problem with its combination of parameters number `index`."""
    values = family.values(index)
    fill = {name: str(value) for name, value in values.items()}
    task = " ".join(Template(family.task).substitute(fill).split())
    solution = Template(family.solution).substitute(fill).strip() + "\n"
    function = compiled(solution, family.entry_point)

    parameters = SimpleNamespace(**values)
    rng = random.Random(hashlib.sha256(f"{family.signature} {task}".encode()).digest())
    chosen = {json.dumps(arguments): arguments for arguments in family.edges(parameters)}
    for _ in range(MAX_DRAWS):
        if len(chosen) >= NUM_CALLS + NUM_EXAMPLES:
            break
        arguments = family.draw(rng, parameters)
        chosen[json.dumps(arguments)] = arguments
    assert len(chosen) == NUM_CALLS + NUM_EXAMPLES, f"{family.entry_point}: {len(chosen)} different calls"
    calls = [{"args": args, "expected": function(*copy.deepcopy(args))} for args in chosen.values()]
    tests, examples = calls[:NUM_CALLS], calls[NUM_CALLS:]

    shown = [f"{family.entry_point}({_listed(call['args'])}) == {call['expected']!r}" for call in examples]
    prompt = (
        f"Write a Python function {family.signature} that {task}\n"
        f"Examples: {'; '.join(shown)}\n"
        "Answer with only the function, in one Python code block."
    )
    return CodeProblem(prompt, solution, {"entry_point": family.entry_point, "calls": tests})


def compiled(source: str, entry_point: str) -> Callable:
    """The function that trusted source defines."""
    namespace: dict = {}
    exec(source, namespace)
    return namespace[entry_point]


def shape_of(source: str) -> str:
    """The source's syntax without its names: equal for solutions that differ in their names alone."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        for attribute in ("id", "arg", "name"):
            if isinstance(getattr(node, attribute, None), str):
                name = getattr(node, attribute)
                setattr(node, attribute, names.setdefault(name, f"name{len(names)}"))
    return ast.dump(tree)


def _listed(arguments: list) -> str:
    return ", ".join(repr(argument) for argument in arguments)


# What the families draw from


def integers(rng: random.Random, low: int, high: int, max_length: int = 8, min_length: int = 0) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(min_length, max_length))]


def word(rng: random.Random, max_length: int = 8, min_length: int = 1, letters: str = "abcdefgh") -> str:
    return "".join(rng.choices(letters, k=rng.randint(min_length, max_length)))


def words(rng: random.Random, max_count: int = 6, min_count: int = 0, **kwargs: Any) -> list[str]:
    return [word(rng, **kwargs) for _ in range(rng.randint(min_count, max_count))]
