"""Problems: disjoint, repeatable, and broken input named. Rewards: through the workers."""

import functools
import hashlib
import json
import os
import runpy
import subprocess
import sys

import pytest

import data_loader
from data_loader import (
    DATASETS,
    Problem,
    compute_rewards,
    default_max_new_tokens,
    load_problems,
    math_reward,
)
from gspo.sandbox import run_tests
from gspo.tasks import generated, rewards
from support import ROOT
from support.sandbox import needs_sandbox

WITHOUT_CODE = [*generated.SOURCES, ("sort", "easy")]
WITH_CODE = [*(("code", level) for level in generated.FAMILIES), ("mixed", "easy")]
GENERATED = [*WITHOUT_CODE, *(pytest.param(*case, marks=needs_sandbox) for case in WITH_CODE)]
# (train, eval) problems. A zebra puzzle takes half a second, so its seven generators give two problems each.
COUNTS = {("reasoning", "hard"): (14, 14)}
USUAL_COUNTS = (60, 40)
EVAL_SEED = 2  # another than that of the training problems


@functools.cache
def problems_of(name: str, difficulty: str, split: str) -> list[Problem]:
    """Problems that several tests look at: they are generated once."""
    count = COUNTS.get((name, difficulty), USUAL_COUNTS)[split == "eval"]
    return load_problems(name, split, count, seed=EVAL_SEED if split == "eval" else 0, difficulty=difficulty)


def digest_of(problems: list[Problem]) -> str:
    return hashlib.sha256(repr(problems).encode()).hexdigest()


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def apples(count: int) -> list[dict]:
    return [
        {"question": f"Ann has {n} apples and buys one more. How many?", "answer": f"{n} + 1\n#### {n + 1}"}
        for n in range(count)
    ]


@pytest.mark.parametrize("name, difficulty", GENERATED)
def test_train_and_eval_share_no_prompt_and_repeat_none(name, difficulty):
    train = {problem.prompt for problem in problems_of(name, difficulty, "train")}
    held_out = {problem.prompt for problem in problems_of(name, difficulty, "eval")}
    assert (len(train), len(held_out)) == COUNTS.get((name, difficulty), USUAL_COUNTS)
    assert not train & held_out


def test_mirrored_sums_are_on_the_same_side():
    train, held_out = (
        {p.prompt.split("?")[0] for p in load_problems("math", split, 120, difficulty="easy")}
        for split in ("train", "eval")
    )
    assert not {frozenset(text.split()) for text in train} & {frozenset(text.split()) for text in held_out}


@needs_sandbox
def test_the_same_seed_gives_the_same_problems_in_another_process():
    """The order of a set of strings depends on the hash seed, so the other process has another one."""
    everything = [(*case, COUNTS.get(case, USUAL_COUNTS)[0]) for case in [*WITHOUT_CODE, *WITH_CODE]]
    code = (
        "import hashlib, data_loader as d\n"
        f"for name, level, count in {everything}:\n"
        "    problems = d.load_problems(name, 'train', count, 0, level)\n"
        "    print(name, level, hashlib.sha256(repr(problems).encode()).hexdigest())"
    )
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = [f"{name} {level} {digest_of(problems_of(name, level, 'train'))}" for name, level, _ in everything]
    assert done.stdout.splitlines() == ours
    assert load_problems("math", "train", 40, 8) != load_problems("math", "train", 40, 7)


@pytest.mark.parametrize("name, difficulty", GENERATED)
def test_every_reference_earns_its_reward_and_another_answer_does_not(name, difficulty):
    problems = problems_of(name, difficulty, "train")[:40]
    marks = {"math": "#### ", "reasoning": "#### ", "code": "", "exact": ""}
    assert compute_rewards(problems, [marks[p.kind] + p.answer for p in problems]) == [1.0] * len(problems)
    assert max(compute_rewards(problems, ["I do not know."] * len(problems))) == 0.0


@needs_sandbox
def test_mixed_is_two_to_two_to_one():
    kinds = [p.kind for p in load_problems("mixed", "train", 50)]
    assert [kinds.count(kind) for kind in ("math", "code", "reasoning")] == [20, 20, 10]
    assert set(kinds[:10]) == {"math", "code", "reasoning"}
    assert [p.kind for p in load_problems("mixed", "train", 50, seed=1)] != kinds


def test_sort_prompt_is_digits_and_equals_sign():
    problem = load_problems("sort", "train", 1)[0]
    digits = problem.prompt.removesuffix("=")
    assert problem.kind == "exact" and 12 <= len(digits) <= 24 and "".join(sorted(digits)) == problem.answer
    assert compute_rewards([problem] * 2, [problem.answer + "\n", problem.answer + "9"]) == [1.0, 0.0]


def test_short_answers_only_where_the_prompt_asks_for_them():
    assert default_max_new_tokens("math", "easy") == 32 and default_max_new_tokens("mixed", "easy") == 128
    assert default_max_new_tokens("math", "hard") is None and default_max_new_tokens("gsm8k", "easy") is None


def test_file_split_is_disjoint_and_complete_and_shows_no_solution(tmp_path):
    rows = apples(20) + apples(3) + [{"question": "What is half of one?", "answer": "\\frac{1}{2}"}]
    path = write_jsonl(tmp_path / "apples.jsonl", rows)
    with pytest.warns(UserWarning, match="17 problems, 100 were asked for"):
        train = load_problems("file", "train", 100, path=path)
    held_out = load_problems("mixed", "eval", 4, seed=5, path=path)  # a path alone implies file
    prompts = {p.prompt for p in train} | {p.prompt for p in held_out}
    assert (len(train), len(held_out), len(prompts)) == (17, 4, 21)
    assert not any("+ 1" in prompt for prompt in prompts)
    assert load_problems("file", "train", 5, seed=1, path=path) != load_problems(
        "file", "train", 5, seed=2, path=path
    )
    problem = next(p for p in [*train, *held_out] if "half" not in p.prompt)
    assert compute_rewards([problem], [f"So she has {problem.answer} apples."]) == [1.0]


@pytest.mark.parametrize("line, message", [
    ('{"question": "a", ', "line 2: not valid JSON"),
    ("[1, 2]", "line 2: list instead of an object"),
    ('{"question": "a"}', "line 2: no field 'answer' among 'question'; name .* --answer_col"),
    ('{"query": "a", "answer": "3"}', "line 2: no field 'question' among .*; name .* --prompt_column"),
    ('{"question": "a", "answer": [3]}', "line 2: answer is list"),
    ('{"question": ["a"], "answer": "3"}', "line 2: question has a message that is not"),
    ('{"question": [], "answer": "3"}', "line 2: question must end with a message"),
    ('{"question": " ", "answer": "3"}', "line 2: empty question"),
    ('{"question": "a", "answer": "long story #### "}', "line 2: empty reference"),
    ('{"question": "a", "answer": "Paris"}', "line 2: the reference answer 'Paris'"),
])  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(apples(1)[0]) + "\n" + line + "\n" + json.dumps(apples(2)[1]) + "\n")
    with pytest.raises(ValueError, match=f"broken.jsonl, {message}"):
        load_problems("file", "train", 1, path=str(path))


def test_files_that_are_no_jsonl(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "utf16").write_text(json.dumps(apples(1)[0]), encoding="utf-16")
    (tmp_path / "bom").write_text(
        "".join(json.dumps(row) + "\r\n" for row in apples(5)), encoding="utf-8-sig"
    )
    for name, message in [
        ("empty", "0 different"),
        ("utf16", "not UTF-8"),
        ("none", "not there"),
        ("", "a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_problems("file", "train", 1, path=str(tmp_path / name))
    assert len(load_problems("file", "train", 4, path=str(tmp_path / "bom"))) == 4


@pytest.mark.parametrize("arguments, message", [
    (("maths", "train", 1), "unknown data set 'maths'; choose one of " + ", ".join(DATASETS)),
    (("math", "test", 1), "unknown split 'test'; choose one of train, eval"),
    (("math", "train", 1, 0, "auto"), "unknown difficulty 'auto'"),
    (("math", "train", 0), "at least 1"),
    (("file", "train", 1), "--dataset_path"),
    (("sort", "train", 1, 0, "easy", "x.jsonl"), "not sort"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_problems(*arguments)


def test_more_problems_than_exist(monkeypatch):
    """Of a generator that has a hundred, and of another with some of the same problems."""
    sources = [generated.Source("products", dict(max_digits=1), question) for question in ("{question}",) * 2]
    monkeypatch.setitem(generated.SOURCES, ("math", "easy"), sources)
    with pytest.raises(
        ValueError, match="math has [67]. different problems for train at difficulty easy, and 200"
    ):
        load_problems("math", "train", 200)


def test_every_kind_of_reward_that_a_data_set_names_exists():
    for name, dataset in DATASETS.items():
        assert dataset.help and dataset.rewards and set(dataset.rewards) <= set(rewards.REWARDS), name
        assert dataset.load or dataset.hub or dataset.takes_path, name
    with pytest.raises(ValueError, match="problem p: unknown kind 'essay'"):
        compute_rewards([Problem("p", "essay", "", "")], ["x"])
    for name, difficulty in WITHOUT_CODE:
        assert {p.kind for p in problems_of(name, difficulty, "train")} == set(DATASETS[name].rewards)


@needs_sandbox
def test_kinds_are_rewarded_together_in_the_order_of_the_problems():
    problems = [problems_of(name, "easy", "train")[0] for name in ("sort", "code", "math", "reasoning")]
    problems = [*problems, *reversed(problems)]
    for wrong in range(len(problems)):
        responses = [p.answer if p.kind in ("exact", "code") else f"#### {p.answer}" for p in problems]
        responses[wrong] = "I do not know."
        assert compute_rewards(problems, responses) == [float(i != wrong) for i in range(len(problems))]


def test_the_example_in_the_docs(monkeypatch):
    """docs/extending.md: its lines in data_loader.py, and nothing else, make a data set."""
    section = (
        (ROOT / "docs" / "extending.md").read_text().partition("## A data set\n")[2].partition("\n## ")[0]
    )
    code = section.partition("```python\n")[2].partition("```")[0]
    assert 5 <= len(code.splitlines()) <= 15
    monkeypatch.setattr(data_loader, "DATASETS", dict(DATASETS))
    exec(code, dict(vars(data_loader)))
    (name,) = data_loader.DATASETS.keys() - DATASETS.keys()
    train, held_out = load_problems(name, "train", 60), load_problems(name, "eval", 40, seed=1)
    assert len({p.prompt for p in train + held_out}) == 100
    assert train == load_problems(name, "train", 60) != load_problems(name, "train", 60, seed=1)
    responses = [f"It is {p.answer}." for p in train]
    assert compute_rewards(train, responses) == [1.0] * 60
    assert compute_rewards(train, responses[1:] + responses[:1]) == [0.0] * 60
    assert default_max_new_tokens(name, "easy") is None


def test_the_import_is_quick():
    """train_gspo.py reads DATASETS for its --help, before anything heavy is imported."""
    heavy = [
        "torch",
        "transformers",
        "numpy",
        "datasets",
        "huggingface_hub",
        "reasoning_gym",
        "sympy",
        "tqdm",
    ]
    code = f"import sys, data_loader; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_gsm8k_without_network_names_the_flag():
    code = "from data_loader import load_problems; load_problems('gsm8k', 'train', 1)"
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": "/nonexistent",
        "HF_DATASETS_CACHE": "/tmp",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30
    )
    assert "ValueError: cannot load openai/gsm8k" in done.stderr and "--dataset_path" in done.stderr


def test_a_response_that_hangs_is_not_judged_and_costs_only_itself(monkeypatch):
    monkeypatch.setattr(rewards._graders(os.getpid()), "timeout_s", 1.5)
    problems = [Problem(str(n), "math", "", "2\\sqrt{3}") for n in range(3)]
    responses = ["\\boxed{\\sqrt{12}}", "\\boxed{9^{9^{9^9}}}", "\\boxed{4}"]
    assert compute_rewards(problems, responses) == [1.0, None, 0.0]


def test_a_bad_reference_is_reported_with_the_problems_id():
    with pytest.raises(ValueError, match="problem p7: .*'Paris'"):
        compute_rewards([Problem("p7", "math", "", "Paris")], ["17"])


def test_math_reward():
    assert (math_reward("#### 1,000", "1000"), math_reward("3 or 4", "4")) == (1.0, 0.0)


@needs_sandbox
def test_self_check_passes(monkeypatch, capsys):
    """Run as a script, but in this process, whose workers are up; its endless program ends sooner."""
    monkeypatch.setattr(rewards, "run_tests", functools.partial(run_tests, timeout_s=1.0))
    monkeypatch.setattr(sys, "argv", ["data_loader.py"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(ROOT / "data_loader.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "32 of 32 as expected" in printed
    assert all(f"\n{name}: {dataset.help}\n" in "\n" + printed for name, dataset in DATASETS.items())
