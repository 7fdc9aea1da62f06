"""Trackers: what each has written is read back, by its own package; one that breaks does not end a run."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from gspo.training import trackers
from gspo.training.config import TRACKERS, GSPOConfig
from gspo.training.record import FIELDS
from gspo.training.trackers import Tracker, single_figures, summary
from support import ROOT
from support.commands import run_here
from support.metrics import EVALUATION, GOOD
from support.records import lines_of
from support.runs import EVAL, stop_and_resume
from support.sorting import problems, shared_prefix, trainer

SETTINGS = {"reward_fn": shared_prefix, "eval_frequency": 2}
# The steps of a run over TRAIN in two epochs, and of its evaluations.
BATCHES, EVALUATIONS = [1, 2, 3, 4, 5, 6], [0, 2, 4, 6]


@pytest.fixture
def tracked(tmp_path, monkeypatch, request):
    """The folder of a run that was stopped after three rollout batches and resumed, with a tracker."""
    name = request.param
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stop_and_resume(tmp_path, log_to=name, **SETTINGS)
    return tmp_path / "run"


def check_figures(run, points):
    """points: {name: [(step, value), ...]}, against the lines of the record."""
    for stream, prefix in (("metrics", "train"), ("eval", "eval")):
        for line in lines_of(run / f"{stream}.jsonl"):
            step = line.pop("step")
            for name, value in single_figures(prefix, line).items():
                assert [v for at, v in points[name] if at == step] == pytest.approx([value]), (name, step)
    for name in ("train/loss", "train/clip_fraction_minibatch_0", "train/clip_fraction"):
        assert [at for at, _ in points[name]] == BATCHES
    assert [at for at, _ in points["eval/pass_at_1"]] == EVALUATIONS
    assert not any("by_problem" in name or "by_minibatch" in name for name in points)


def check_rows(run, samples, held_out):
    """Rows as lists that begin with the step, against the lines of the record."""
    lines = lines_of(run / "samples.jsonl")
    assert [(row[0], row[1], row[4]) for row in samples] == [
        (line["step"], line["kind"], line["response"]) for line in lines
    ]
    expected = [
        [line["step"], line["problem"], line["prompt"], line["answer"], response, reward, passed]
        for line in lines_of(run / "eval_samples.jsonl")
        for response, reward, passed in zip(line["responses"], line["rewards"], line["passed"], strict=True)
    ]
    assert held_out == expected and len(expected) == 4 * len(EVAL) * len(EVALUATIONS)


@pytest.mark.parametrize("tracked", ["wandb"], indirect=True)
def test_wandb_holds_the_record(tracked):
    records = wandb_records(tracked)
    points, tables = {}, {"samples": [], "held_out": []}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        for name, value in row.items():
            table, _, field = name.partition("/")
            if table in tables and field == "path":
                (path,) = tracked.glob(f"wandb/offline-run-*/files/{value}")
                tables[table] += json.loads(path.read_text())["data"]
            elif table in ("train", "eval"):
                points.setdefault(name, []).append((row["rollout_batch"], value))
    check_figures(tracked, points)
    check_rows(tracked, tables["samples"], tables["held_out"])
    config, figures = {}, {}
    for record in records:
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "summary":
            figures |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
    assert config["learning_rate"] == 1e-3 and config["algorithm"] == "gspo"
    expected = summary(lines_of(tracked / "eval.jsonl"))
    assert {name: figures[name] for name in expected} == expected


def wandb_records(run):
    """The records of the offline files of a run and of its resumption, oldest first, once both are whole."""
    deadline = time.monotonic() + 60
    while True:  # wandb writes in a process of its own, which may be behind on a busy machine
        paths = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
        found = [record for path in paths for record in records_in(path)]
        if sum(record.WhichOneof("record_type") == "exit" for record in found) == 2:
            return found
        assert time.monotonic() < deadline


def records_in(path):
    """The records of an offline file: a LevelDB log (32 KiB blocks) of wandb's own protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data, offset, message, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        message += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


@pytest.mark.parametrize("tracked", ["tensorboard"], indirect=True)
def test_tensorboard_holds_the_record(tracked):
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    assert len(list((tracked / "tensorboard").iterdir())) == 2  # a file of each process, in one folder
    events = EventAccumulator(str(tracked / "tensorboard"), {TENSORS: 0})
    events.Reload()
    tags = events.Tags()
    points = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in tags["scalars"]}
    check_figures(tracked, points)
    texts = {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in tags["tensors"]
    }
    assert '"learning_rate": 0.001' in texts["config"][0][1]
    for kind in ("best", "worst"):
        assert [step for step, _ in texts[f"samples/{kind}"]] == BATCHES
    for line in lines_of(tracked / "eval_samples.jsonl"):
        (text,) = [text for step, text in texts[f"held_out/{line['problem']:03}"] if step == line["step"]]
        assert all(f"    {shown}" in text for shown in (line["prompt"], line["answer"], *line["responses"]))


def test_tensorboard_hides_what_was_written_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gspo.training.tensorboard_tracker import TensorBoard

    beginnings = (0, (-1.0, -2.0)), (0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0))  # killed before step 1, after it
    for number, (begins, losses) in enumerate(beginnings):
        tracker = TensorBoard(tmp_path, {"resume": None}, begins)
        for step, loss in enumerate(losses, begins + 1):
            tracker.write("metrics", step, {"loss": loss})
        tracker.close()
        for path in (tmp_path / "tensorboard").iterdir():  # files are read in the order of their names
            if not path.name.startswith("events.out.tfevents.000"):
                path.rename(path.with_name(f"events.out.tfevents.000000000{number}"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


TRACKIO = """
import json, sys
sys.path[:0] = ["tests", "."]
from pathlib import Path
from support.runs import stop_and_resume
from support.sorting import shared_prefix
settings = {"reward_fn": shared_prefix, "eval_frequency": 2, "log_to": "trackio"}
folder = Path(sys.argv[1])
stop_and_resume(folder, **settings)
from trackio.sqlite_storage import SQLiteStorage
assert SQLiteStorage.get_projects() == ["gspo"]
(name,) = SQLiteStorage.get_runs("gspo")
assert name.startswith("run-") and name == (folder / "run" / "trackio_name").read_text()
found = {"logs": SQLiteStorage.get_logs("gspo", name), "config": SQLiteStorage.get_run_config("gspo", name)}
Path(sys.argv[2]).write_text(json.dumps(found, default=str))
"""


@pytest.mark.slow
def test_trackio_holds_the_record(tmp_path):
    """In a process of its own: trackio decides where its files are when it is imported."""
    pytest.importorskip("trackio")
    found = tmp_path / "found.json"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, tmp_path, found],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads(found.read_text())
    points, tables = {}, {"samples": [], "held_out": []}
    for row in read["logs"]:
        for name, value in row.items():
            if name in tables:
                tables[name] += [list(cells.values()) for cells in value["_value"]]
            elif "/" in name:
                points.setdefault(name, []).append((row["step"], value))
    check_figures(tmp_path / "run", points)
    check_rows(tmp_path / "run", tables["samples"], tables["held_out"])
    assert read["config"]["learning_rate"] == 1e-3


def test_lists_become_single_figures():
    figures = single_figures("train", GOOD)
    assert [figures[f"train/clip_fraction_minibatch_{i}"] for i in (0, 1)] == [0.0, 0.2]
    assert figures.keys() == {
        *(f"train/{name}" for name in GOOD if name != "clip_fraction_by_minibatch"),
        "train/clip_fraction_minibatch_0", "train/clip_fraction_minibatch_1",
    }  # fmt: skip
    figures = single_figures("eval", EVALUATION)
    assert (figures["eval/interval_95_low"], figures["eval/interval_95_high"]) == (0.1, 0.9)
    assert not any("by_problem" in name for name in figures)


def test_the_summary_has_first_last_and_best_values():
    found = [(0.5, 0.5), (0.75, 0.8), (0.75, 0.9), (0.75, 0.9), (0.25, 1.0)]
    lines = [{"step": 2 * i, "pass_at_1": p, "reward_mean": r} for i, (p, r) in enumerate(found)]
    assert summary(lines) == {
        "eval/pass_at_1_first": 0.5, "eval/pass_at_1_last": 0.25, "eval/pass_at_1_best": 0.75,
        "eval/reward_mean_first": 0.5, "eval/reward_mean_last": 1.0, "eval/reward_mean_best": 0.9,
        "eval/best_step": 4,
    }  # fmt: skip


def test_unknown_trackers_and_those_that_are_not_installed_are_refused_at_once(monkeypatch, tmp_path):
    assert GSPOConfig().trackers == GSPOConfig(log_to="").trackers == ()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    assert GSPOConfig(use_wandb=True).trackers == GSPOConfig(log_to="wandb, wandb").trackers == ("wandb",)
    with pytest.raises(ValueError, match="--log_to mlflow: choose among wandb, tensorboard, trackio"):
        GSPOConfig(log_to="wandb,mlflow")
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(ValueError, match=f"--log_to {name}: .*python -m pip install {name}"):
            GSPOConfig(log_to=name)
    done = run_here("--model_name", "tiny", "--dataset", "sort", "--use_wandb", "--output_dir", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "pip install wandb" in done.stderr
    assert list(tmp_path.iterdir()) == []


class Fake(Tracker):
    """A tracker that breaks at one of its methods."""

    name = "fake"
    where, kind = "", ""

    def step_in(self, method):
        if method == self.where and self.kind == "hangs":
            threading.Event().wait()
        if method == self.where:
            raise SystemExit("it ends itself") if self.kind == "exits" else ConnectionError("un\x1breachable")

    def start(self, settings, step):
        self.step_in("start")

    def log(self, step, figures):
        self.step_in("log")

    def log_texts(self, step, samples, held_out):
        self.step_in("log_texts")

    def summarise(self, step, figures):
        self.step_in("summarise")

    def finish(self):
        self.step_in("finish")


@pytest.mark.parametrize("where", ["start", "log", "log_texts", "summarise", "finish"])
@pytest.mark.parametrize("kind", ["raises", "exits", "hangs"])
def test_a_tracker_never_stops_a_run(tmp_path, monkeypatch, capsys, where, kind):
    monkeypatch.setattr(Fake, "where", where)
    monkeypatch.setattr(Fake, "kind", kind)
    for limit in ("START", "CALL", "FINISH"):
        monkeypatch.setattr(trackers, f"{limit}_S", 0.2)
    monkeypatch.setattr("gspo.training.resume.open_trackers", lambda _, *args: [Fake(*args)])
    t = trainer(output_dir=str(tmp_path), run_name="r", num_epochs=1)
    assert t.train(problems(8), problems(4, seed=1))["finished"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fake: ")]
    assert len(said) == 1 and "the run goes on without it" in said[0] and "\x1b" not in said[0]
    assert all(lines_of(tmp_path / "r" / f"{stream}.jsonl") for stream in FIELDS)


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    from gspo.training.wandb_tracker import Wandb

    asked = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: asked.append(k["id"]) or run))
    for _ in range(2):
        Wandb(tmp_path, {"wandb_project": "x"}, 0)
    assert asked[0] == asked[1] != ""
