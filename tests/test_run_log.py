"""The run's record: lines, folders that are whole or absent, alarms, wandb read back from its file."""

import json
import math
import struct

import pytest

from run_log import RunLog, find_checkpoint, gibberish_reason, stop_reason, warnings_of

GOOD = {
    "loss": 0.1, "grad_norm": 1.0, "clip_fraction": 0.15, "null_clip_fraction": 0.0,
    "importance_ratio_mean": 1.0, "importance_ratio_min": 0.99, "importance_ratio_max": 1.01,
    "zero_variance_groups": 0.5, "reward_mean": 0.3, "entropy": 1.5, "truncated_fraction": 0.0,
    "clip_fraction_by_minibatch": [0.0, 0.2],
}  # fmt: skip


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


def test_folders_are_written_whole_or_not_at_all(tmp_path):
    log = RunLog.create(config(tmp_path))
    with log.writing("best_model") as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(OSError), log.writing("best_model") as folder:
        (folder / "weights").write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "run" / "best_model" / "weights").read_text() == "first"
    with log.writing("best_model") as folder:
        (folder / "weights").write_text("second")
    assert (tmp_path / "run" / "best_model" / "weights").read_text() == "second"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best_model", "config.json"]


def test_checkpoints_are_found_by_run_folder_path_and_latest(tmp_path):
    log = RunLog.create(config(tmp_path))
    for step in (2, 10):
        with log.writing(f"checkpoints/step-{step}") as folder:
            (folder / "training_state.pt").write_text("")
    (tmp_path / "run" / "checkpoints" / "step-11.partial").mkdir()
    newest = tmp_path / "run" / "checkpoints" / "step-10"
    for resume in ("latest", str(tmp_path / "run"), str(newest)):
        assert find_checkpoint(resume, str(tmp_path)) == newest
    assert find_checkpoint(str(newest.with_name("step-2")), "").name == "step-2"
    for resume in ("latest", str(tmp_path)):
        with pytest.raises(ValueError, match="no checkpoint"):
            find_checkpoint(resume, str(tmp_path / "empty"))


def test_rewinding_drops_later_lines_and_a_torn_one(tmp_path):
    log = RunLog.create(config(tmp_path))
    for step in (1, 2, 3):
        log.train(step, GOOD)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    for step in (2, 3):
        with log.writing(f"checkpoints/step-{step}") as folder:
            (folder / "training_state.pt").write_text("")
    log.rewind(2)
    assert [path.name for path in log.checkpoints()] == ["step-2"]
    log.train(3, GOOD)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3] == [m["step"] for m in log.history]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", math.nan),
        ("grad_norm", math.inf),
        ("importance_ratio_max", 101.0),
        ("importance_ratio_mean", math.nan),
    ],
)
def test_bad_updates_are_stopped_and_the_evidence_named(name, value):
    assert stop_reason(GOOD) is None
    assert name in stop_reason({**GOOD, name: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"importance_ratio_max": 11}, "importance ratios"),
        ({"importance_ratio_min": 0.05}, "importance ratios"),
        ({"clip_fraction": 0.9}, "clipped"),
        ({"null_clip_fraction": 0.2}, "null_clip_fraction"),
    ],
)
def test_warnings_look_at_the_last_batch(change, word):
    assert warnings_of([GOOD] * 40) == {}
    (warning,) = warnings_of([GOOD, {**GOOD, **change}]).values()
    assert word in warning


def test_warnings_look_at_the_history():
    tied = {**GOOD, "zero_variance_groups": 1.0}
    assert warnings_of([tied] * 9) == {}
    assert "no learning signal" in warnings_of([tied] * 10)["no signal"]
    assert "loss has risen" in warnings_of([GOOD] * 20 + [{**GOOD, "loss": 2.0}] * 10)["loss"]


def test_a_warning_is_given_when_it_arises_and_not_repeated(tmp_path):
    log = RunLog.create(config(tmp_path))
    clipped = {**GOOD, "clip_fraction": 0.9}
    given = [
        len(log.train(step, metrics)) for step, metrics in enumerate([GOOD, clipped, clipped, GOOD, clipped])
    ]
    assert given == [0, 1, 0, 0, 1]


def test_gibberish_is_measured_against_the_start():
    noise = {**GOOD, "entropy": 8.0, "reward_mean": 0.0}
    endless = {**GOOD, "truncated_fraction": 1.0, "reward_mean": 0.0}
    assert gibberish_reason([GOOD] * 10) is None
    assert "entropy" in gibberish_reason([GOOD] * 5 + [noise] * 5)
    assert "ended" in gibberish_reason([GOOD] * 5 + [endless] * 5)
    assert gibberish_reason([endless] * 20) is None, "a model that never ended has not got worse"
    assert gibberish_reason([GOOD] * 5 + [{**noise, "reward_mean": 0.1}] * 5) is None


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
