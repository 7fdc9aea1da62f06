"""The run's record: lines, folders, which run and checkpoint are resumed."""

import json
import math
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from gspo.policy.rollout import Rollout
from gspo.training.checkpoints import STATE_FILE, STATE_FORMAT
from gspo.training.config import GSPOConfig
from gspo.training.find_run import resumed_folder
from gspo.training.record import OPTIONAL, read_lines
from gspo.training.resume import open_run
from gspo.training.rollout_batch import Sample
from gspo.training.sampling import evaluation_texts
from support.metrics import EVALUATION, GOOD
from support.records import contents


def config(tmp_path, **other):
    settings = {"output_dir": str(tmp_path), "run_name": "run", "model_name": "org/model"}
    return GSPOConfig(**(settings | other))


def begin(tmp_path, **other):
    """A run that has begun."""
    run = open_run(config(tmp_path, **other), problems="digest", num_queries=40)
    run.begin({})
    return run


def close(run):
    run.record.close()
    run.folder.close()


def write_checkpoint(folder, step, config, lines=None):
    """A checkpoint that knows where it stands, without weights."""
    with folder.writing(f"checkpoints/step-{step}") as path:
        state = {"format": STATE_FORMAT, "step": step, "pending": [], "sampled": 4 * step}
        state["settings"] = asdict(config)
        torch.save(state | {"lines": lines or {}}, path / STATE_FILE)


def test_each_line_is_on_disk_when_written(tmp_path):
    record = begin(tmp_path).record
    for step in (1, 2):
        record.add_metrics(step, GOOD)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, **GOOD} and len(lines) == step


def test_a_new_run_never_writes_into_an_old_one(tmp_path):
    begin(tmp_path)  # even before its first rollout batch
    with pytest.raises(ValueError, match="already holds a run"):
        begin(tmp_path)
    (tmp_path / "run" / "config.json").write_text("damaged")
    with pytest.raises(ValueError, match="already holds a run"):
        begin(tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "/tmp/x", ".hidden", "", "a b"])
def test_run_names_stay_in_the_output_folder(tmp_path, name):
    if name:
        with pytest.raises(ValueError, match="run_name"):
            begin(tmp_path, run_name=name)
    else:
        assert begin(tmp_path, run_name=name).folder.path.name.startswith("model-gspo-")


def test_a_run_is_found_by_its_folder_its_checkpoints_and_as_the_latest(tmp_path):
    for name in ("old", "run"):
        run = begin(tmp_path, run_name=name)
        for step in (2, 10):
            with run.folder.writing(f"checkpoints/step-{step}") as folder:
                (folder / "config.json").write_text("{}")
        close(run)
        folder = run.folder
    run = tmp_path / "run"
    (run / "checkpoints" / "step-11.partial").mkdir()
    (tmp_path / "no_run").mkdir()
    for resume in ("latest", str(run), str(run / "checkpoints" / "step-2")):
        assert resumed_folder(resume, str(tmp_path)) == run
    assert [path.name for path in folder.checkpoints()] == ["step-2", "step-10"]
    for resume in ("latest", str(tmp_path / "no_run"), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=f"--resume {resume}"):
            resumed_folder(resume, str(tmp_path / "no_run"))


def test_a_run_is_found_from_anywhere(tmp_path, monkeypatch):
    """From inside its folder, from one that is called checkpoints, and after it was moved."""
    output_dir = tmp_path / "checkpoints"
    begun = begin(output_dir)
    write_checkpoint(begun.folder, 0, config(output_dir))
    close(begun)
    run = output_dir / "run"
    places = ((run, "."), (run, "checkpoints/step-0"), (run / "checkpoints", "step-0"), (output_dir, "run"))
    for place, resume in (*places, (run / "checkpoints" / "step-0", "."), (run / "checkpoints", "..")):
        monkeypatch.chdir(place)
        assert resumed_folder(resume, "gspo_outputs") == run
        resumed = begin(tmp_path / "elsewhere", resume=resume)
        assert resumed.folder.path == run and resumed.checkpoint.name == "step-0"
        close(resumed)
    with pytest.raises(ValueError, match="neither a run's folder"):
        resumed_folder("", str(output_dir))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    def resumed_from(resume):
        run = begin(tmp_path, resume=str(resume))
        close(run)
        return run.checkpoint.name

    begun = begin(tmp_path)
    for step in (1, 2, 3):
        begun.record.add_metrics(step, GOOD)
        write_checkpoint(begun.folder, step, config(tmp_path), {"metrics": step})
    close(begun)
    newest = tmp_path / "run" / "checkpoints" / "step-3"
    assert resumed_from("latest") == "step-3"
    with pytest.raises(ValueError, match="no such checkpoint"):
        begin(tmp_path, resume=str(newest.with_name("step-9")))
    os.truncate(newest / STATE_FILE, 999)
    assert resumed_from(newest) == "step-2"
    assert "step-3 is not used: training_state.pt is cut short or damaged" in capsys.readouterr().err
    assert resumed_from(newest.with_name("step-1")) == "step-1"
    for path in begun.folder.checkpoints():
        (path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole"):
        begin(tmp_path, resume=str(tmp_path / "run"))


def test_a_run_folder_has_one_process_at_a_time(tmp_path):
    run = begin(tmp_path)
    with pytest.raises(ValueError, match="another process"):
        begin(tmp_path, resume=str(tmp_path / "run"))
    close(run)
    close(begin(tmp_path, resume=str(tmp_path / "run")))


def test_rewinding_drops_later_lines_and_a_torn_one(tmp_path):
    run = begin(tmp_path)
    record = run.record
    for step in (1, 2, 3):
        record.add_metrics(step, GOOD)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    for step in (2, 3):
        with run.folder.writing(f"checkpoints/step-{step}") as folder:
            (folder / "training_state.pt").write_text("")
    record.rewind(2, {"metrics": 2})
    assert [path.name for path in run.folder.checkpoints()] == ["step-2"]
    record.add_metrics(3, GOOD)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3] == [m["step"] for m in record.history]


RECORDS = {"metrics": {"step": 2, **GOOD}, "eval": EVALUATION, "samples": {"step": 1},
           "eval_samples": {"step": 0, "problem": 3, "cut_characters": 0}}  # fmt: skip
NO_RECORDS = (
    "5", "{}", "null", "[]", '"text"', "{", "\x00" * 9, "\xff", "[" * 100_000, '{"step": "a"}',
    '{"step": true}', '{"step": -1}', '{"step": 1.5}', '{"step": ' + "9" * 5000 + "}",
)  # fmt: skip


@pytest.mark.parametrize("stream", RECORDS)
def test_a_damaged_record_is_refused_by_name_and_left_alone(stream, tmp_path):
    """Lines that are no records, and records in which one figure is missing or no number."""
    record = begin(tmp_path).record
    for name, good in RECORDS.items():
        lines = [good | {"step": min(step, good["step"])} for step in (1, 2)]
        (tmp_path / "run" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, counts = tmp_path / "run" / f"{stream}.jsonl", dict.fromkeys(RECORDS, 2)
    record.rewind(2, counts)
    first, second = path.read_text().splitlines()
    whole = json.loads(second)
    needed = [name for name in whole if name not in OPTIONAL]
    spoilt = [{n: v for n, v in whole.items() if n != name} for name in needed]
    values = ("x", None, [None], {}, 10**400, math.nan)
    spoilt += [whole | {name: value} for name in needed for value in values]
    for line in (*NO_RECORDS, *map(json.dumps, spoilt)):
        path.write_text(f"{first}\n{line}\n", encoding="latin-1")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"{stream}.jsonl, line 2: .*damaged"):
            record.rewind(2, counts)
        assert contents(tmp_path) == before
    path.write_text(first + "\n")
    with pytest.raises(ValueError, match=f"{stream}.jsonl lacks lines"):
        record.rewind(2, counts)
    record.rewind(1, dict.fromkeys(RECORDS, 1))


def test_damage_after_the_checkpoint_does_not_matter(tmp_path):
    """A loss of power leaves it so: the checkpoint was synced, what came later was not."""
    record = begin(tmp_path).record
    record.add_metrics(1, GOOD)
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for rest in (bytes(4096), bytes(100) + b"\n" + bytes(100), b'{"st', b"5\n"):
        (tmp_path / "run" / "metrics.jsonl").write_bytes(whole + rest)
        record.rewind(1, {"metrics": 1})
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole


def test_a_warning_is_given_when_it_arises_and_not_repeated(tmp_path):
    record = begin(tmp_path).record
    clipped = {**GOOD, "clip_fraction": 0.9}
    batches = [GOOD, clipped, clipped, GOOD, clipped]
    given = [len(record.add_metrics(step, metrics)) for step, metrics in enumerate(batches)]
    assert given == [0, 1, 0, 0, 1]


def sampled(prompt, answer, texts, reward):
    problem = SimpleNamespace(prompt=prompt, answer=answer)
    return [Sample(problem, Rollout([1], [2], [0.0], text, True), reward) for text in texts]


def test_held_out_texts_are_kept_and_cut(tmp_path):
    chat = [{"role": "user", "content": "caf\u00e9"}]
    samples = sampled("p" * 5000, "a" * 4001, ["r" * 9000, "", "\x1b[2J\x00\ud800</script>", "4", "5"], None)
    samples += sampled(chat, None, "12345", 0.5)
    samples[5].passed = True
    lines = evaluation_texts(samples, group_size=5)
    assert lines[0] == {
        "problem": 0, "prompt": "p" * 4000, "answer": "a" * 4000,
        "responses": ["r" * 4000, "", "\x1b[2J\x00\ud800</script>", "4"],
        "rewards": [None] * 4, "passed": [False] * 4, "cut_characters": 1000 + 1 + 5000,
    }  # fmt: skip
    assert lines[1] == {
        "problem": 1, "prompt": '[{"role": "user", "content": "caf\u00e9"}]', "answer": None,
        "responses": ["1", "2", "3", "4"], "rewards": [0.5] * 4, "passed": [True, False, False, False],
        "cut_characters": 0,
    }  # fmt: skip
    record = begin(tmp_path).record
    record.add_evaluation(7, EVALUATION, lines)
    written = (tmp_path / "run" / "eval_samples.jsonl").read_bytes()
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in written)  # nothing that moves a cursor
    assert read_lines(tmp_path / "run", "eval_samples") == [{"step": 7, **line} for line in lines]


def test_held_out_texts_of_a_hundred_problems_are_kept():
    lines = evaluation_texts(sampled("p", "a", ["r"] * 242, 1.0), group_size=2)
    assert [line["problem"] for line in lines] == list(range(100)) and lines[99]["responses"] == ["r", "r"]
