"""Function-writing problems: each family's reference passes its tests, and what is wrong does not."""

import functools
import gzip
import json
from string import Template

import pytest

from data_loader import RewardFunction, code_reward, compute_rewards, load_problems
from gspo.sandbox import SandboxError, run_tests
from gspo.tasks.code_answer import code_of, program_of
from gspo.tasks.code_benchmarks import code_problem
from gspo.tasks.code_families.family import NUM_CALLS, TOPICS, instantiate
from gspo.tasks.generated import FAMILIES
from gspo.tasks.rewards import run_all_tests
from support.sandbox import needs_sandbox
from support.wrong_easy import WRONG_EASY
from support.wrong_hard import WRONG_HARD
from support.wrong_medium import WRONG_MEDIUM

WRONG = WRONG_EASY | WRONG_MEDIUM | WRONG_HARD
EVERY_FAMILY = [family for families in FAMILIES.values() for family in families]

pytestmark = needs_sandbox


def test_there_are_enough():
    names = [family.entry_point for family in EVERY_FAMILY]
    assert len(names) == len(set(names)) >= 60 and set(names) == set(WRONG)
    assert all({family.topic for family in families} == set(TOPICS) for families in FAMILIES.values())
    assert all(sum(family.size for family in families) >= 1500 for families in FAMILIES.values())
    for family in EVERY_FAMILY:  # no parameter is for show: the two sides would then share problems
        solutions = {Template(family.solution).substitute(family.values(i)) for i in range(family.size)}
        assert len(solutions) == family.size, family.entry_point


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.entry_point)
def test_reference_passes_and_stub_and_three_wrong_solutions_fail(family):
    for index in (0, family.size // 2, family.size - 1):
        problem = instantiate(family, index)
        values = {name: str(value) for name, value in family.values(index).items()}
        wrong = [Template(source).substitute(values) for source in WRONG[family.entry_point]]
        assert len(set(wrong)) == 3
        stub = f"def {family.signature}:\n    pass\n"
        programs = [problem.solution, stub, *wrong]
        results = run_all_tests([(program, problem.tests) for program in programs])
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
    ("Sure! ```python\nx = 1\n```\nThat was it.", "x = 1\n"),
    ("```python\nx = 1```\nDone.", "x = 1"),
    ("~~~python\nx = 1\n~~~\n", "x = 1\n"),
    ("````\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
    ("```python\nx = 1\n```\n```\n", "x = 1\n"),
    ("Set ```x``` to 1.", "Set ```x``` to 1."),
    ("```python title='a b'\nx = 1\n```", "x = 1\n"),
    ("\ufeffx = 1", "x = 1"),
    ("```python\nf = 1\n```\nIt prints\n```\n14\n```", "14\n"),
    ("```python\nx = 1  # not ```\ny = 2\n```\nDone.", "x = 1  # not ```\ny = 2\n"),
    ("```python\ns = '''\n'```\n'''\n```\nDone.", "s = '''\n'```\n'''\n"),
    ("```python\nx = ~1```\nDone.", "x = ~1"),
    ("```python\nx = 1\n```<|im_end|>\nDone.", "x = 1\n"),
    ("```python\nx = 1\n``` </think> Done.", "x = 1\n"),
    ("```python\nx = 1```</s>", "x = 1"),
    ("```python\nx = '''\n```2\n'''\n```\nDone.", "x = '''\n```2\n'''\n"),
    ("```python\ns = '''\n    \n'''\n```", "s = '''\n    \n'''\n"),
    ("```python\n\n  s = 1\n  t = 2\n```", "\ns = 1\nt = 2\n"),
    ("```\n'''\n    ```\n    f()\n    ```\n'''\n   ```\nDone.", "'''\n    ```\n    f()\n    ```\n'''\n"),
    ("\t```\n\tx = 1\n\t```\nDone.", "x = 1\n"),
    ("1000. ```\n      x = 1\n      ```\nDone.", "x = 1\n"),
])  # fmt: skip
def test_code_of_a_response(response, code):
    assert code_of(response) == code


@pytest.mark.parametrize("after", [
    "It prints\n```\n14\n```", "Use it like this:\n```python\nprint(f(3) == 14)\nx.f = 3\n```",
    "```python\n# tests", "```python\ndef g(x): return f(x)\n```",
])  # fmt: skip
@pytest.mark.parametrize(
    "code", ["def f(x):\n    return 1\n", "f = lambda x: 1\n", "class f: pass\n", "f: object = abs\n"]
)
def test_the_last_block_that_defines_the_function_counts(code, after):
    assert code_of(f"```\ndef f(x): return 0\n```\n```python\n{code}```\n{after}", "f") == code


@pytest.mark.parametrize("before", [
    "", "from __future__ import annotations\n", "'''Of f.'''\r\nfrom __future__ import annotations\r\n",
    "from __future__ import (\n    annotations,\n    division,\n)\n",
    "# \f\u2028\nfrom __future__ import \\\n    annotations; x = 1\n",
    "from __future__ import division\n" * 2,
])  # fmt: skip
def test_future_imports_stand_before_a_preamble(before):
    after = "def f(x: List):\n    return '''\nfrom __future__ import annotations\n'''\n"
    preamble = "from typing import List\n"
    program = program_of(before + after, "f", preamble)
    assert program == before + preamble + after
    compile(program, "solution.py", "exec")


def test_few_problems_are_of_other_families_for_another_seed():
    def names(seed):
        return {p.metadata["tests"]["entry_point"] for p in load_problems("code", "eval", 20, seed=seed)}

    assert names(0) == names(0) != names(1)
    assert set.union(*map(names, range(12))) == {family.entry_point for family in FAMILIES["easy"]}


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
    quickly = functools.partial(run_tests, timeout_s=0.3)
    monkeypatch.setattr("gspo.tasks.rewards.run_tests", quickly)
    assert rewards(problems * 2, ["while True: pass", problems[1].answer] * 2) == [0.0, 1.0] * 2
    assert rewards.metrics == {"code_timeouts": 2}

    def fails(code, tests):
        raise SandboxError("broken")

    monkeypatch.setattr("gspo.tasks.rewards.run_tests", fails)
    with pytest.warns(UserWarning, match="1 of 1 programs were not judged: broken"):
        assert rewards(problems, ["x", problems[1].answer]) == [None, 1.0]
    assert rewards.metrics == {"code_timeouts": 0}


def test_without_a_sandbox_code_problems_are_bad_input(monkeypatch):
    def fails():
        raise SandboxError("no seccomp")

    monkeypatch.setattr("gspo.tasks.rewards.check_machine", fails)
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
    """Rows that differ in their texts and, by a line of no effect, in their solutions."""
    field, code = ("prompt", "canonical_solution") if "prompt" in template else ("text", "code")
    return [
        template
        | {
            "task_id": n,
            field: template[field].replace("each", f"each, {n}").replace("word.", f"word. {n}"),
            code: f"{template[code].rstrip()}\n\nROW = {n}\n",
        }
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
    path = tmp_path / "rows.jsonl"

    def load(unsound: range) -> list[str]:
        rows = rows_of(MBPP, 10)
        for n in unsound:
            rows[n]["code"] = f"def letters(word): return {n}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [p.id for split in ("train", "eval") for p in load_problems("file", split, 8, path=str(path))]

    with pytest.warns(UserWarning, match=r"left out \d problems .*task \d \(fail\)"):
        assert set(load(range(0, 10, 2))) == {f"task {n}" for n in range(1, 10, 2)}
    with pytest.raises(ValueError, match="left out 8 problems whose own solution fails"):
        load(range(10))


def test_tests_that_cannot_be_run_are_the_problems_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = rows_of(MBPP, 6)
    rows[0]["test_list"] = ["assert letters(map(str, range(3)))"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"left out 1 problems .*task 0 \(unsupported\)"):
        kept = [p for split in ("train", "eval") for p in load_problems("file", split, 6, path=str(path))]
    assert len(kept) == 5
    kept[0].metadata["tests"]["asserts"] = "no test"
    with pytest.raises(ValueError, match=f"problem {kept[0].id}: .*SyntaxError"):
        compute_rewards(kept[:1], ["x"])


def test_a_failing_sandbox_is_no_verdict_on_a_problem(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(MBPP, 4)))

    def fails(code, tests):
        raise SandboxError("broken")

    monkeypatch.setattr("gspo.tasks.rewards.run_tests", fails)
    with pytest.warns(UserWarning, match="not judged"), pytest.raises(ValueError, match="sandbox failed"):
        load_problems("file", "train", 1, path=str(path))


def test_one_solution_is_on_one_side_of_a_file(tmp_path):
    """Rows with the same solution but for its names share a side, wherever the boundary would fall."""
    rows = rows_of(MBPP, 12)
    for n, row in enumerate(rows):
        row["code"] = f"def letters(word):\n    v{n} = {{c: word.count(c) for c in word}}\n    return v{n}\n"
        row["code"] += f"GROUP = {n // 3}"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="were asked for"):
        sides = [
            {int(p.id.split()[1]) // 3 for p in load_problems("file", split, 12, path=str(path))}
            for split in ("train", "eval")
        ]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {0, 1, 2, 3}


def test_a_decorated_function_is_asked_for_with_its_decorator():
    prompt = "from functools import cache\n\n@cache\ndef halves(xs):\n    pass\n"
    problem = code_problem(HUMAN_EVAL | {"prompt": prompt})
    assert problem.preamble == "from functools import cache\n\n"


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
    (MBPP | {"test_list": [3]}, "test_list is no list of strings"),
    (MBPP | {"challenge_test_list": [None]}, "challenge_test_list is no list of strings"),
    (MBPP | {"test_imports": "import math"}, "test_imports is no list of strings"),
    (MBPP | {"test_setup_code": 3}, "test_setup_code is int, not str"),
    (HUMAN_EVAL | {"test": "assert halves([]) == []"}, "test defines no function check"),
])  # fmt: skip
def test_a_broken_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(HUMAN_EVAL) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{message}"):
        load_problems("file", "train", 1, path=str(path))
