"""Function-writing problems: each family's reference passes its tests, and what is wrong does not."""

import gzip
import json
from string import Template

import pytest
from conftest import needs_sandbox
from wrong_easy import WRONG_EASY
from wrong_hard import WRONG_HARD
from wrong_medium import WRONG_MEDIUM

from code_benchmarks import code_problem
from code_family import NUM_CALLS, TOPICS, instantiate
from code_sandbox import SandboxError, run_tests
from data_loader import (
    FAMILIES,
    RewardFunction,
    _run_code,
    code_of,
    code_reward,
    compute_rewards,
    load_problems,
)

WRONG = WRONG_EASY | WRONG_MEDIUM | WRONG_HARD
EVERY_FAMILY = [family for families in FAMILIES.values() for family in families]

pytestmark = needs_sandbox


def test_there_are_enough():
    names = [family.entry_point for family in EVERY_FAMILY]
    assert len(names) == len(set(names)) >= 60 and set(names) == set(WRONG)
    assert all({family.topic for family in families} == set(TOPICS) for families in FAMILIES.values())
    assert all(sum(family.size for family in families) >= 1500 for families in FAMILIES.values())


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.entry_point)
def test_reference_passes_and_stub_and_three_wrong_solutions_fail(family):
    for index in (0, family.size // 2, family.size - 1):
        problem = instantiate(family, index)
        values = {name: str(value) for name, value in family.values(index).items()}
        wrong = [Template(source).substitute(values) for source in WRONG[family.entry_point]]
        assert len(set(wrong)) == 3
        stub = f"def {family.signature}:\n    pass\n"
        programs = [problem.solution, stub, *wrong]
        results = _run_code([(program, problem.tests) for program in programs])
        statuses = [result.status for result in results]
        assert statuses[0] == "pass" and statuses[1] == "fail", (index, statuses)
        assert {"pass", "timeout", "crash"}.isdisjoint(statuses[2:]), (index, results)
        assert results[0].total == NUM_CALLS


@pytest.mark.parametrize("level", FAMILIES)
def test_tests_of_train_and_eval_differ_and_every_family_is_on_both_sides(level):
    train = load_problems("code", "train", 150, difficulty=level)
    held_out = load_problems("code", "eval", 150, seed=1, difficulty=level)
    tests = [{json.dumps(p.metadata["tests"]) for p in problems} for problems in (train, held_out)]
    assert len(tests[0]) == len(tests[1]) == 150 and not tests[0] & tests[1]
    names = {family.entry_point for family in FAMILIES[level]}
    for problems in (train, held_out):
        assert {p.metadata["tests"]["entry_point"] for p in problems} == names
    assert compute_rewards(train[:20], [f"```python\n{p.answer}```" for p in train[:20]]) == [1.0] * 20
    assert set(compute_rewards(train[:20], ["I do not know."] * 20)) == {0.0}


@pytest.mark.parametrize("response, code", [
    ("```python\nx = 1\n```", "x = 1\n"),
    ("First:\n```\nx = 0\n```\nthen\n```py\nx = 1\n```\nDone.", "x = 1\n"),
    ("So:\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    ("x = 1", "x = 1"),
    ("1. like this:\n   ```python\n   if x:\n       y\n   ```\n", "if x:\n    y\n"),
    ("```python\ns = '''```'''\n```", "s = '''```'''\n"),
    ("", ""),
])  # fmt: skip
def test_code_of_a_response(response, code):
    assert code_of(response) == code


def test_rewards_are_all_or_nothing_or_the_fraction():
    problem = load_problems("code", "train", 1)[0]
    tests = {"entry_point": "f", "calls": [{"args": [x], "expected": 2 * x} for x in (0, 1, 2, 3)]}
    problem.metadata["tests"] = tests
    responses = [
        "def f(x): return 2 * x",
        "def f(x): return x * x",
        "def f(x): return 2 * x if x else 1",
        "def f(",
    ]
    assert compute_rewards([problem] * 4, responses) == [1.0, 0.0, 0.0, 0.0]
    assert RewardFunction("fraction")([problem] * 4, responses) == [1.0, 0.5, 0.75, 0.0]
    assert [code_reward(response, tests) for response in responses] == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="choose one of all, fraction"):
        RewardFunction("some")


def test_timeouts_are_counted_and_a_failure_of_the_sandbox_is_no_verdict(monkeypatch):
    problems = load_problems("code", "train", 1) + load_problems("math", "train", 1)
    rewards = RewardFunction()
    monkeypatch.setattr("data_loader.run_tests", lambda code, tests: run_tests(code, tests, timeout_s=0.3))
    assert rewards(problems * 2, ["while True: pass", problems[1].answer] * 2) == [0.0, 1.0] * 2
    assert rewards.metrics == {"code_timeouts": 2}

    def fails(code, tests):
        raise SandboxError("broken")

    monkeypatch.setattr("data_loader.run_tests", fails)
    with pytest.warns(UserWarning, match="not judged: broken"):
        assert rewards(problems, ["x", problems[1].answer]) == [None, 1.0]
    assert rewards.metrics == {"code_timeouts": 0}


def test_without_a_sandbox_code_problems_are_bad_input(monkeypatch):
    def fails():
        raise SandboxError("no seccomp")

    monkeypatch.setattr("data_loader.check_machine", fails)
    for name in ("code", "mixed"):
        with pytest.raises(ValueError, match="cannot be judged here: no seccomp"):
            load_problems(name, "train", 5)


# Files: rows in the formats of HumanEval and MBPP, written for these tests

HUMAN_EVAL = {
    "task_id": "Test/1",
    "prompt": "from typing import List\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    'def halves(xs: List[int]) -> List[int]:\n    """ Halve each.\n    >>> halves([4])\n    [2]\n    """\n',
    "entry_point": "halves",
    "canonical_solution": "    return [half(x) for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([4, 5]) == [half(4), 2]\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to count the letters of a word.",
    "code": "from collections import Counter\ndef letters(word):\n    return Counter(word)",
    "test_setup_code": "import math",
    "test_list": ["assert letters('aab') == {'a': 2, 'b': 1}", "assert math.isclose(len(letters('')), 0)"],
    "challenge_test_list": ["assert letters('ccc') == {'c': 3}"],
}  # fmt: skip


def rows_of(template: dict, count: int) -> list[dict]:
    field = "prompt" if "prompt" in template else "text"
    return [
        template | {field: template[field].replace("each", f"each, {n}").replace("word.", f"word. {n}")}
        for n in range(count)
    ]


@pytest.mark.parametrize("template, right, wrong", [
    (HUMAN_EVAL, "def halves(xs: List[int]): return list(map(half, xs))", "def halves(xs): return xs"),
    (MBPP, "def letters(w): return {c: w.count(c) for c in w}", "def letters(w): return {'a': 2, 'b': 1}"),
])  # fmt: skip
def test_benchmark_files(tmp_path, template, right, wrong):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(template, 10)))
    for name in ("file", "code", "mixed"):
        train, held_out = (
            load_problems(name, split, n, path=str(path)) for split, n in (("train", 8), ("eval", 2))
        )
        assert len({p.prompt for p in train + held_out}) == 10
    codes = [f"```python\n{code}\n```" for code in (right, wrong, "x")]
    assert compute_rewards(train[:3], codes) == [1.0, 0.0, 0.0]
    hidden = "half(4)" if template is HUMAN_EVAL else "ccc"
    assert not any(hidden in p.prompt for p in train)
    compressed = tmp_path / "rows.jsonl.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_problems("file", "train", 8, path=str(compressed)) == train
    compressed.write_bytes(compressed.read_bytes()[:50])
    with pytest.raises(ValueError, match="cut short"):
        load_problems("file", "train", 8, path=str(compressed))


def test_a_problem_whose_own_solution_fails_is_left_out_and_named(tmp_path):
    rows = rows_of(MBPP, 10)
    for n in range(9):
        rows[n]["code"] = "def letters(word): return 0"
        rows[n]["task_id"] = n
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning) as warned:
        kept = load_problems("file", "train", 8, path=str(path)) + load_problems(
            "file", "eval", 2, path=str(path)
        )
    assert [p.id for p in kept] == ["task 7"]
    assert any(
        "left out 8 problems" in str(w.message) or "left out 7 problems" in str(w.message) for w in warned
    )


def test_the_sanitized_mbpp_has_other_names():
    row = {
        "prompt": MBPP["text"],
        "code": MBPP["code"],
        "test_imports": ["import math"],
        "test_list": MBPP["test_list"],
    }
    assert code_problem(row).tests == code_problem(MBPP | {"challenge_test_list": []}).tests


@pytest.mark.parametrize("row, message", [
    (HUMAN_EVAL | {"test": 3}, "test is int, not str"),
    ({k: v for k, v in HUMAN_EVAL.items() if k != "canonical_solution"}, "canonical_solution is missing"),
    (HUMAN_EVAL | {"entry_point": "thirds"}, "does not begin a function thirds"),
    (HUMAN_EVAL | {"prompt": "def f(:"}, "prompt is not Python"),
    (MBPP | {"test_list": ["assert g(1)"], "challenge_test_list": []}, "call none of the functions"),
    (MBPP | {"test_list": [], "challenge_test_list": []}, "has no assert"),
    (MBPP | {"code": "def f(:"}, "code is not Python"),
])  # fmt: skip
def test_a_broken_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(HUMAN_EVAL) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{message}"):
        load_problems("file", "train", 1, path=str(path))
