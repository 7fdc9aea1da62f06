"""A user's own data: file formats, columns, prompts, answers, held-out problems, the hub, any generator."""

import csv
import gzip
import json

import pytest

import data_loader
from data_loader import Problem, RowFormat, compute_rewards, load_problems
from gspo.tasks.generators import load_generator

ROWS = [
    {"question": f"What is {i} + {i}?", "answer": 2 * i, "level": "low" if i < 5 else "high"}
    for i in range(10)
]


def write(path, rows):
    """The rows in the format that the file's name says."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def load(path, split="train", count=8, **form):
    return load_problems("file", split, count, path=path, form=RowFormat(**form))


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.parquet", "a.json", "a.jsonl", "a.jsonl.gz", "a.anything"]
)
def test_every_format_gives_the_same_problems(tmp_path, name):
    problems = load(write(tmp_path / name, ROWS))
    by_prompt = {p.prompt: p.answer for p in problems}
    assert len(by_prompt) == 8 and all(p.kind == "math" for p in problems)
    expected = load(write(tmp_path / "expected.jsonl", ROWS))
    assert by_prompt == {p.prompt: p.answer for p in expected}
    assert problems[0].columns()["level"] in ("low", "high")
    assert compute_rewards(problems[:1], [f"#### {problems[0].answer}"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'question,answer\n"a,3\n', "before line . unexpected end|line .: unexpected end"),
        ("a.csv", b"question,answer\na,3,4\nb,5\n", "line 2: not as many fields"),
        ("a.csv", b"question,answer\na\nb,5\n", "line 2: not as many fields"),
        ("a.csv", b"question,answer,answer\na,1,2\n", "line 1: a name stands twice"),
        ("a.parquet", b"PAR1 and nothing else", "cannot be read as parquet"),
        ("a.json", b'[{"question": "a"', "not valid JSON"),
        ("a.json", b"[3]", "item 1: int instead of an object"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_columns_by_name_and_by_default(tmp_path):
    for column in ("prompt", "problem", "question"):
        rows = [{column: row["question"], "answer": row["answer"]} for row in ROWS]
        assert len(load(write(tmp_path / f"{column}.jsonl", rows))) == 8
    rows = [{"q": row["question"], "target": str(row["answer"]), "answer": "?"} for row in ROWS]
    path = write(tmp_path / "named.jsonl", rows)
    problem = load(path, prompt_column="q", answer_column="target")[0]
    assert problem.prompt.startswith("What is ") and int(problem.answer) % 2 == 0
    with pytest.raises(
        ValueError, match="no field 'x' among 'q', 'target', 'answer'; name .* --prompt_column"
    ):
        load(path, prompt_column="x")


def test_nothing_is_added_silently(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert all(p.prompt.endswith('alone after "####".') for p in load(path))
    assert all(p.prompt.endswith("?") for p in load(path, prompt_suffix=""))
    assert all(p.prompt.endswith("? In one word.") for p in load(path, prompt_suffix=" In one word."))
    assert all(p.prompt.endswith("?") for p in load(path, own_reward=True))
    # The suffix decides neither which problems are taken nor their order.
    taken = [[p.id for p in load(path, count=4, prompt_suffix=s)] for s in (None, "", " Now.")]
    assert taken[0] == taken[1] == taken[2]


def test_a_reward_of_ones_own_needs_no_answer_and_sees_the_row_as_it_is(tmp_path):
    rows = [{"prompt": f"Say {i}.", "words": [i], "none": None} for i in range(10)]
    path = write(tmp_path / "a.jsonl", rows)
    problem = load(path, own_reward=True)[0]
    assert problem.columns() == {"id": problem.id, "answer": "", **problem.metadata["columns"]}
    assert problem.columns()["words"] and problem.columns()["none"] is None
    with pytest.raises(ValueError, match="no field 'answer'"):
        load(path)
    human_eval = [
        {"task_id": str(i), "prompt": f"def f{i}():", "entry_point": "f", "test": ""} for i in range(5)
    ]
    assert load(write(tmp_path / "h.jsonl", human_eval), count=4, own_reward=True)[0].kind == "math"


def test_chat_messages_are_prompts(tmp_path):
    def chat(i):
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i} + 1?"}]

    rows = [{"prompt": chat(i), "answer": i + 1} for i in range(10)]
    for name in ("a.jsonl", "a.parquet"):
        problem = load(write(tmp_path / name, rows), prompt_suffix=" Now.")[0]
        assert [m["role"] for m in problem.prompt] == ["system", "user"]
        assert problem.prompt[1]["content"].endswith("+ 1? Now.")
    for messages, message in [
        ([{"role": "user"}], "a message that is not"),
        (["hello"], "a message that is not"),
        ([{"role": "user", "content": ["a"]}], "a message that is not"),
        ([{"role": "assistant", "content": "a"}], "must end with a message that the model is to answer"),
    ]:
        with pytest.raises(ValueError, match=f"line 1: prompt .*{message}|line 1: prompt {message}"):
            load(write(tmp_path / "b.jsonl", [{"prompt": messages, "answer": 1}]))


def test_text_answers_are_compared_letter_for_letter(tmp_path):
    cities = {"France": "Paris", "Peru": "Lima", "Chad": "N'Djamena", "Iran": "Tehran", "Fiji": "Suva"}
    rows = [{"question": f"The capital of {land}?", "answer": city} for land, city in cities.items()]
    problems = load(write(tmp_path / "a.jsonl", rows), count=4)
    assert {p.kind for p in problems} == {"text"}
    paris = Problem("p", "text", "", "Paris")
    responses = [
        "Paris",
        " Paris\n",
        "So ...\n#### Paris",
        "The answer is **Paris**.",
        "paris",
        "Not Paris",
        "Lima",
        "",
    ]
    assert compute_rewards([paris] * 8, responses) == [1, 1, 1, 1, 0, 0, 0, 0]
    # One that is no value among values is a mistake.
    rows = [*ROWS, {"question": "The capital of Peru?", "answer": "see below", "level": ""}]
    with pytest.raises(ValueError, match="line 11: the reference answer 'see below'"):
        load(write(tmp_path / "b.jsonl", rows))


def test_held_out_problems_of_their_own(tmp_path):
    held_out = [*ROWS[:2], {"question": "What is 50 + 50?", "answer": 100}]
    path, eval_path = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", held_out)
    assert len(load(path, "eval", 3, eval_path=eval_path)) == 3
    with pytest.warns(UserWarning, match="2 problems are held out as well"):
        train = load(path, "train", 8, eval_path=eval_path)
    assert len(train) == 8 and not {p.answer for p in train} & {"0", "2", "100"}
    with pytest.raises(ValueError, match="0 problems to train on"):
        load(path, "train", 8, eval_path=path)
    with pytest.raises(ValueError, match="nowhere.jsonl is not there"):
        load(path, "train", 8, eval_path=str(tmp_path / "nowhere.jsonl"))


def test_a_data_set_on_the_hub(monkeypatch):
    import datasets
    import huggingface_hub

    made = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:4])
    asked = []

    def from_hub(repository, configuration):
        asked.append((repository, configuration))
        return datasets.DatasetDict(
            {"train": made[0], "validation": made[1]} if configuration else {"all": made[0]}
        )

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    with pytest.warns(UserWarning, match="4 problems are held out as well"):
        assert len(load_problems("owner/name:main", "train", 6)) == 6
    assert len(load_problems("owner/name:main", "eval", 4)) == 4
    assert len(load_problems("owner/name", "eval", 2)) == 2  # a fifth of the only split
    assert asked == [("owner/name", "main")] * 2 + [("owner/name", None)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    with pytest.raises(
        ValueError, match="cannot load owner/name from the hub .ZeroDivisionError: .*--dataset_path"
    ):
        load_problems("owner/name", "eval", 4)


def test_any_generator_with_its_own_scorer():
    """Grids of several lines, answers with a hash sign, scorers that tell tuples from lists."""
    for name in ("ab", "arc_1d", "rearc", "polynomial_multiplication"):
        problems = load_generator(name, "train", 3, 0, " Now.")
        assert all(p.prompt.endswith(" Now.") for p in problems)
        assert compute_rewards(problems, [f"So\n#### {p.answer}" for p in problems]) == [1.0] * 3
        others = load_generator(name, "eval", 3, 0, "")
        assert not {p.id for p in problems} & {p.id for p in others}
    with pytest.warns(UserWarning, match="countdown pays 0.01 for ''"):
        load_problems("reasoning_gym:countdown", "train", 3)
    with pytest.warns(UserWarning, match="ransom_note depends on the hash seed"):
        load_problems("reasoning_gym:ransom_note", "train", 3)
    for name, message in [
        ("zebra_puzzle", "no generator 'zebra_puzzle'; it has zebra_puzzles"),
        ("composite", "default settings"),
        ("", "no generator ''"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_problems(f"reasoning_gym:{name}", "train", 3)


@pytest.mark.parametrize("flag", ["prompt_column", "answer_column", "prompt_suffix", "eval_path"])
def test_settings_of_own_data_are_refused_elsewhere(flag):
    with pytest.raises(ValueError, match=f"--{flag}.* not with --dataset math"):
        load_problems("math", "train", 3, form=RowFormat(**{flag: "x"}))


def test_the_command_shows_a_task(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert data_loader.main(["--dataset_path", path, "--system_prompt", "Think briefly."]) == 0
    shown = capsys.readouterr().out
    assert "Think briefly." in shown and "Reason step by step" in shown and "the reference answer" in shown
    (tmp_path / "r.py").write_text("def score(problem, response):\n    return 0.5\n")
    assert data_loader.main(["--dataset_path", path, "--reward", f"{tmp_path}/r.py:score"]) == 1
    assert "do not earn more" in capsys.readouterr().out
    (tmp_path / "r.py").write_text(
        "def score(problem, response):\n    return None if '1' in response else 1\n"
    )
    assert data_loader.main(["--dataset_path", path, "--reward", f"{tmp_path}/r.py:score"]) == 1
    assert "of the responses were not judged" in capsys.readouterr().out
    (tmp_path / "r.py").write_text("def score(problem, response):\n    return 1\n")
    bare = write(tmp_path / "bare.jsonl", [{"prompt": f"Say {i}."} for i in range(10)])
    assert data_loader.main(["--dataset_path", bare, "--reward", f"{tmp_path}/r.py:score"]) == 0
    assert "the reference answer" not in capsys.readouterr().out
    assert data_loader.main(["--dataset_path", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("data_loader.py: ")
