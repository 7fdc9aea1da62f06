"""The run's record: lines, folders, which run and checkpoint are resumed, wandb read back from its file."""

import json
import math
import os
import struct

import pytest

from gspo.training.run_log import RunLog, resumed_folder
from support.metrics import GOOD
from support.records import contents


def config(tmp_path, **other):
    base = {"resume": None, "output_dir": str(tmp_path), "run_name": "run", "use_wandb": False}
    return {**base, "wandb_project": "test", "model_name": "org/model", "algorithm": "gspo", **other}


def test_each_line_is_on_disk_when_written(tmp_path):
    log = RunLog.create(config(tmp_path))
    for step in (1, 2):
        log.train(step, GOOD)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, **GOOD} and len(lines) == step


def test_a_new_run_never_writes_into_an_old_one(tmp_path):
    RunLog.create(config(tmp_path))  # even before its first rollout batch
    with pytest.raises(ValueError, match="already holds a run"):
        RunLog.create(config(tmp_path))


@pytest.mark.parametrize("name", ["../up", "a/b", "/tmp/x", ".hidden", "", "a b"])
def test_run_names_stay_in_the_output_folder(tmp_path, name):
    if name:
        with pytest.raises(ValueError, match="run_name"):
            RunLog.create(config(tmp_path, run_name=name))
    else:
        assert RunLog.create(config(tmp_path, run_name=name)).folder.name.startswith("model-gspo-")


def test_a_run_is_found_by_its_folder_its_checkpoints_and_as_the_latest(tmp_path):
    for name in ("old", "run"):
        log = RunLog.create(config(tmp_path, run_name=name))
        for step in (2, 10):
            with log.writing(f"checkpoints/step-{step}") as folder:
                (folder / "config.json").write_text("{}")
        log.close()
    run = tmp_path / "run"
    (run / "checkpoints" / "step-11.partial").mkdir()
    (tmp_path / "no_run").mkdir()
    for resume in ("latest", str(run), str(run / "checkpoints" / "step-2")):
        assert resumed_folder(resume, str(tmp_path)) == run
    assert [path.name for path in log.checkpoints()] == ["step-2", "step-10"]
    for resume in ("latest", str(tmp_path / "no_run"), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=f"--resume {resume}"):
            resumed_folder(resume, str(tmp_path / "no_run"))


def test_a_run_is_found_from_anywhere(tmp_path, monkeypatch):
    """From inside its folder, from one that is called checkpoints, and after it was moved."""
    output_dir = tmp_path / "checkpoints"
    log = RunLog.create(config(output_dir))
    with log.writing("checkpoints/step-2") as folder:
        (folder / "training_state.pt").write_text("")
    log.close()
    run = output_dir / "run"
    places = ((run, "."), (run, "checkpoints/step-2"), (run / "checkpoints", "step-2"), (output_dir, "run"))
    for place, resume in (*places, (run / "checkpoints" / "step-2", "."), (run / "checkpoints", "..")):
        monkeypatch.chdir(place)
        assert resumed_folder(resume, "gspo_outputs") == run
        log = RunLog.create(config(tmp_path / "elsewhere", resume=resume))
        assert log.folder == run and log.whole_checkpoint(resume).name == "step-2"
        log.close()
    with pytest.raises(ValueError, match="neither a run's folder"):
        resumed_folder("", str(output_dir))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    log = RunLog.create(config(tmp_path))
    for step in (1, 2, 3):
        with log.writing(f"checkpoints/step-{step}") as folder:
            (folder / "training_state.pt").write_bytes(bytes(1000))
    newest = log.checkpoints()[-1]
    assert log.whole_checkpoint("latest") == newest
    os.truncate(newest / "training_state.pt", 999)
    assert log.whole_checkpoint("latest").name == log.whole_checkpoint(str(newest)).name == "step-2"
    assert "step-3 is not used: training_state.pt is cut short or damaged" in capsys.readouterr().err
    assert log.whole_checkpoint(str(newest.with_name("step-1"))).name == "step-1"
    with pytest.raises(ValueError, match="no such checkpoint"):
        log.whole_checkpoint(str(newest.with_name("step-9")))
    for path in log.checkpoints():
        (path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole"):
        log.whole_checkpoint("latest")


def test_a_run_folder_has_one_process_at_a_time(tmp_path):
    log = RunLog.create(config(tmp_path))
    again = config(tmp_path, resume=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="another process"):
        RunLog.create(again)
    log.close()
    RunLog.create(again).close()


def test_rewinding_drops_later_lines_and_a_torn_one(tmp_path):
    log = RunLog.create(config(tmp_path))
    for step in (1, 2, 3):
        log.train(step, GOOD)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    for step in (2, 3):
        with log.writing(f"checkpoints/step-{step}") as folder:
            (folder / "training_state.pt").write_text("")
    log.rewind(2, {"metrics": 2})
    assert [path.name for path in log.checkpoints()] == ["step-2"]
    log.train(3, GOOD)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3] == [m["step"] for m in log.history]


EVALUATION = {
    "step": 0, "pass_at_1": 0.5, "interval_95": [0.1, 0.9], "reward_mean": 0.5, "response_tokens_mean": 9.0,
    "pass_by_problem": [0.25, 0.75],
}  # fmt: skip
RECORDS = {"metrics": {"step": 2, **GOOD}, "eval": EVALUATION, "samples": {"step": 1}}
NO_RECORDS = (
    "5", "{}", "null", "[]", '"text"', "{", "\x00" * 9, "\xff", "[" * 100_000, '{"step": "a"}',
    '{"step": true}', '{"step": -1}', '{"step": 1.5}', '{"step": ' + "9" * 5000 + "}",
)  # fmt: skip


@pytest.mark.parametrize("stream", RECORDS)
def test_a_damaged_record_is_refused_by_name_and_left_alone(stream, tmp_path):
    """Lines that are no records, and records in which one figure is missing or no number."""
    log = RunLog.create(config(tmp_path))
    for name, good in RECORDS.items():
        lines = [good | {"step": min(step, good["step"])} for step in (1, 2)]
        (tmp_path / "run" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, counts = tmp_path / "run" / f"{stream}.jsonl", dict.fromkeys(RECORDS, 2)
    log.rewind(2, counts)
    first, second = path.read_text().splitlines()
    record = json.loads(second)
    needed = [name for name in record if name != "kl"]
    spoilt = [{n: v for n, v in record.items() if n != name} for name in needed]
    values = ("x", None, [None], {}, 10**400, math.nan)
    spoilt += [record | {name: value} for name in needed for value in values]
    for line in (*NO_RECORDS, *map(json.dumps, spoilt)):
        path.write_text(f"{first}\n{line}\n", encoding="latin-1")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"{stream}.jsonl, line 2: .*damaged"):
            log.rewind(2, counts)
        assert contents(tmp_path) == before
    path.write_text(first + "\n")
    with pytest.raises(ValueError, match=f"{stream}.jsonl lacks lines"):
        log.rewind(2, counts)
    log.rewind(1, dict.fromkeys(RECORDS, 1))


def test_damage_after_the_checkpoint_does_not_matter(tmp_path):
    """As a loss of power leaves it: the checkpoint was synced, what came later was not."""
    log = RunLog.create(config(tmp_path))
    log.train(1, GOOD)
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for rest in (bytes(4096), bytes(100) + b"\n" + bytes(100), b'{"st', b"5\n"):
        (tmp_path / "run" / "metrics.jsonl").write_bytes(whole + rest)
        log.rewind(1, {"metrics": 1})
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole


def test_a_warning_is_given_when_it_arises_and_not_repeated(tmp_path):
    log = RunLog.create(config(tmp_path))
    clipped = {**GOOD, "clip_fraction": 0.9}
    given = [
        len(log.train(step, metrics)) for step, metrics in enumerate([GOOD, clipped, clipped, GOOD, clipped])
    ]
    assert given == [0, 1, 0, 0, 1]


def test_wandb_holds_the_same_figures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog.create(config(tmp_path, use_wandb=True))
    log.evaluation(0, {"pass_at_1": 0.25, "interval_95": [0.1, 0.4]})
    for step in (1, 2, 3):
        log.train(step, {**GOOD, "loss": 0.1 * step})
    log.evaluation(3, {"pass_at_1": 0.5, "interval_95": [0.3, 0.7]})
    log.close()
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    history = wandb_history(path)
    train = [row for row in history if "train/loss" in row]
    assert [row["rollout_batch"] for row in train] == [1, 2, 3]
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row, line in zip(train, recorded, strict=True):
        assert {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")} == {
            k: v for k, v in line.items() if k != "step"
        }
    assert [row["eval/pass_at_1"] for row in history if "eval/pass_at_1" in row] == [0.25, 0.5]


def wandb_history(path):
    """The history rows of an offline run: a LevelDB log (32 KiB blocks) of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, offset, message, rows = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        message += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows
