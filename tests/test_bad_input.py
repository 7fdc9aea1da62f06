"""Two hundred inputs that somebody might type or write into a file: accepted, or refused in one line."""

import gzip
import json
import random
import re
import sys

import pytest

import train_gspo
from gspo.training.command_line import MAX_MESSAGE, complain
from gspo.training.config import GSPOConfig
from gspo.training.stopping import StopRequest
from gspo.training.training_run import TrainingRun
from support.records import contents

TINY = ["--model_name", "tiny", "--dataset", "sort", "--num_train_samples", "6", "--num_eval_samples", "4"]
VALUES = (
    "", " ", "-1", "0", "1", "2", "3", "7", "nan", "-inf", "1e400", "1e-400", "0x10", "1_0", "٣", "9" * 400,
    "None", "true", "auto", "gspo", "code", "float32", "cpu", "cuda", "-", "--", "a b", "..", "../up", "/",
    "/dev/null", "/proc/nope", "/dev/zero", ".", "~", "x" * 5000, "\x1b[31mred", "line\nline", "\ud800", "%s",
    "{0}", "'; rm -rf x", "🦁", "<script>", "a\x00b",
)  # fmt: skip
# On a hub id the answer depends on the network.
FLAGS = sorted(set(GSPOConfig.__dataclass_fields__) - {"model_name", "dry_run", "use_wandb"})


def outcome(arguments, monkeypatch, capsys):
    """Exit code and standard error of the command, without the training."""

    def finish_at_once(run):
        run.close()
        return {"before": None, "after": None, "best": None, "finished": True}

    monkeypatch.setattr(TrainingRun, "train", finish_at_once)
    monkeypatch.setattr(StopRequest, "on_signals", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["train_gspo.py"])
    try:
        code = train_gspo.main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err.splitlines()


def refused_in_one_line(code, said):
    assert code in (0, 2), said
    if code == 2:
        # what takes longer than two seconds, as a reference that no grader can judge, has a progress bar
        (line,) = [line for line in said if line.strip() and "%|" not in line]
        assert line.startswith("train_gspo.py: ") and line.isprintable() and len(line) < MAX_MESSAGE + 50, (
            said
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1e-300"),
        ("left_clip_range", "1e300"),
        ("right_clip_range", "1e40"),
        ("kl_coef", "1e300"),
        ("group_size", "3000000000"),
        ("output_dir", "\udcff"),
        ("output_dir", "x" * 5000),
        ("output_dir", "x" * 300 + "/y"),
        ("model_name", "x/" * 2500),
        ("model_name", "x" * 5000),
    ],
)
def test_values_that_a_library_would_stumble_over(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = outcome([*TINY, f"--{name}", value], monkeypatch, capsys)
    assert code in (1, 2) and len(said) == 1 and said[0].startswith("train_gspo.py: "), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(10))
def test_flags(seed, tmp_path, monkeypatch, capsys):
    """Ten command lines each, with one to three flags that are anything."""
    monkeypatch.chdir(tmp_path)
    draw, codes = random.Random(seed), []
    for i in range(10):
        flags = [
            x for name in draw.sample(FLAGS, draw.randint(1, 3)) for x in (f"--{name}", draw.choice(VALUES))
        ]
        where = [] if "--run_name" in flags else ["--run_name", f"r{i}"]
        code, said = outcome([*TINY, *where, *flags], monkeypatch, capsys)
        refused_in_one_line(code, said)
        codes.append(code)
        assert code == 0 or not (tmp_path / "gspo_outputs" / f"r{i}" / "metrics.jsonl").exists()
    assert 2 in codes


def lines(count=12):
    return [{"question": f"{i} + {i}?", "answer": f"So it is {2 * i}. #### {2 * i}"} for i in range(count)]


def spoil(kind, draw):
    """A problem file's bytes, spoilt in one place."""
    rows = lines()
    row = rows[draw.randrange(len(rows))]
    text = None
    match kind:
        case "type":
            row[draw.choice(["question", "answer"])] = draw.choice(
                [None, 3, 1e999, [], {}, True, ["a"], [[]] * 9]
            )
        case "missing":
            del row[draw.choice(["question", "answer"])]
        case "empty field":
            row[draw.choice(["question", "answer"])] = draw.choice(["", " ", "\n", "####", "#### "])
        case "odd text":
            row[draw.choice(["question", "answer"])] += draw.choice(
                [
                    "\ud800",
                    "\x00",
                    "\x1b[2J",
                    "\u202e",
                    "x" * 3_000_000,
                    "####",
                    "9" * 5000,
                    "\\frac{1}{",
                    "9^9^9^9",
                ]
            )
        case "no object":
            rows.insert(draw.randrange(12), draw.choice([[], 3, "text", None, True]))
        case "benchmark":
            check = {
                "entry_point": "f",
                "prompt": "x",
                "test": "y",
                "canonical_solution": "z",
                "task_id": "t",
            }
            asserts = {"text": "t", "code": "(", "test_list": ["assert"], "task_id": 1}
            row.clear()
            row |= draw.choice([{"task_id": 3}, check, asserts])
        case "nested":
            text = "".join(json.dumps(row) + "\n" for row in rows) + draw.choice(["[", '{"a":']) * 200_000
        case "number":
            text = "".join(json.dumps(row) + "\n" for row in rows) + '{"question": ' + "9" * 10_000 + "}\n"
    content = (text or "".join(json.dumps(row) + "\n" for row in rows)).encode()
    match kind:
        case "cut":
            content = content[: draw.randrange(len(content))]
        case "flip":
            content = bytearray(content)
            for _ in range(draw.choice([1, 1, 30])):
                content[draw.randrange(len(content))] = draw.randrange(256)
        case "encoding":
            content = (
                content.decode().replace("So", "Tschüß").encode(draw.choice(["utf-16", "utf-32", "latin-1"]))
            )
        case "nothing":
            content = draw.choice([b"", b"\n\n", b"\xef\xbb\xbf", b"\x00" * 1000, b"[]", b"{}", b"\x1f\x8b"])
        case "gzip":
            content = gzip.compress(content)
            content = draw.choice(
                [content, content[: len(content) // 2], content[:20] + b"\x00" + content[21:]]
            )
        case "ends":
            content = content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\x0b", b"\n\n", b""]))
    return bytes(content)


KINDS = (
    "type", "missing", "empty field", "odd text", "no object", "benchmark", "nested", "number", "cut", "flip",
    "encoding", "nothing", "gzip", "ends",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_problem_files(kind, tmp_path, monkeypatch, capsys):
    """Eight files each."""
    monkeypatch.chdir(tmp_path)
    draw, codes = random.Random(kind), []
    for i in range(8):
        (tmp_path / "p.jsonl").write_bytes(spoil(kind, draw))
        flags = ["--model_name", "tiny", "--dataset_path", "p.jsonl", "--run_name", f"r{i}"]
        code, said = outcome(flags, monkeypatch, capsys)
        refused_in_one_line(code, said)
        codes.append(code)
    assert 2 in codes


@pytest.mark.parametrize("name, value", [
    ("group_size", "4"), ("group_size", True), ("num_epochs", None), ("learning_rate", "x"), ("dataset", 3),
    ("model_name", 7), ("seed", 1.5), ("use_wandb", 1), ("environment", {}), ("run_name", "../up"),
    ("nonsense", 3), ("learning_rate", 10**400), ("kl_coef", 10**400), ("batch_size", 10**20),
])  # fmt: skip
def test_settings_of_a_run_that_were_edited_by_hand(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert outcome([*TINY, "--run_name", "r"], monkeypatch, capsys)[0] == 0
    path = tmp_path / "gspo_outputs" / "r" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    code, said = outcome(["--resume", "latest"], monkeypatch, capsys)
    refused_in_one_line(code, said)
    assert code == (0 if name in ("environment", "run_name", "nonsense") else 2)


@pytest.mark.parametrize("text", ["", "{}", "[]", "nothing", "\x00", "[" * 100_000, '{"a":' * 100_000])
def test_settings_that_are_none(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("r", "newer"):
        assert outcome([*TINY, "--run_name", name], monkeypatch, capsys)[0] == 0
    (tmp_path / "gspo_outputs" / "newer" / "config.json").write_text(text)
    code, said = outcome(["--resume", "gspo_outputs/newer"], monkeypatch, capsys)
    refused_in_one_line(code, said)
    assert code == 2 and "neither a run's folder nor" in said[0]
    assert outcome(["--resume", "latest"], monkeypatch, capsys)[0] == 0  # r


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", ""], "neither a run's folder"),
        (["--resume", "gspo_outputs"], "neither a run's folder"),
        (["--resume", "gspo_outputs/r/checkpoints"], "neither a run's folder"),
        (["--resume", "gspo_outputs/r/checkpoints/step-9"], "no such checkpoint"),
        (["--resume", "latest", "--seed", "7"], "--seed 0 .now 7"),
        (["--resume", "latest", "--seed", "7", "--dry_run"], "--seed 0 .now 7"),
        (["--resume", "latest", "--run_name", "s"], "--run_name s: the resumed run is"),
        (["--resume", "latest", "--dataset_path", "other.jsonl"], "--dataset_path None .now .*/other.jsonl"),
    ],
)
def test_a_refused_resume_changes_nothing(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert outcome([*TINY, "--run_name", "r"], monkeypatch, capsys)[0] == 0
    for left_by_a_kill in ("checkpoints/step-3.partial", "best_model.previous"):
        (tmp_path / "gspo_outputs" / "r" / left_by_a_kill).mkdir(parents=True)
        (tmp_path / "gspo_outputs" / "r" / left_by_a_kill / "file").write_text("")
    before = contents(tmp_path)
    code, said = outcome(flags, monkeypatch, capsys)
    refused_in_one_line(code, said)
    assert code == 2 and re.search(words, said[0]), said
    if "step-9" not in flags[1]:  # to know which checkpoints there are, what a kill left is tidied
        assert contents(tmp_path) == before


def test_what_a_message_quotes_cannot_move_the_cursor(capsys):
    complain("p", "a\x1b[2Jb\nc\u202e" + "x" * 5000)
    said = capsys.readouterr().err
    assert said.startswith("p: a\\x1b[2Jb\\x0ac\\x202e") and said.count("\n") == 1 and len(said) < 1100
