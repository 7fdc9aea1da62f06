"""A run that was stopped, killed or damaged, and resumed, writes what an uninterrupted one writes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gspo.training import record
from gspo.training.alarms import EmergencyStop
from gspo.training.config import GSPOConfig
from gspo.training.find_run import refuse_other_settings
from gspo.training.record import FIELDS
from gspo.training.stopping import Interrupted
from gspo.training.training_run import TrainingRun
from support import ROOT
from support.commands import exit_code_of, forked, wait_for
from support.metrics import EVALUATION
from support.records import contents, lines_of, record_of, weights_of_run
from support.runs import EVAL, TRAIN, new_trainer, seed_everything, tied_by_problem, tied_for_some
from support.sorting import problems, shared_prefix, trainer

DYNAMIC = {"dynamic_sampling": "reward", "batch_size": 2, "reward_fn": tied_for_some, "update_frequency": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run, by update frequency, and of one with dynamic sampling."""
    runs = {}
    for name, settings in ((1, {}), (3, {"update_frequency": 3}), ("dynamic", DYNAMIC)):
        folder = tmp_path_factory.mktemp("uninterrupted")
        seed_everything()
        new_trainer(folder, **settings).train(TRAIN, EVAL)
        runs[name] = folder / "run"
    return runs


def stop_at_the_third_place(t):
    check, places = t.stop.check, iter(range(100))

    def check_at_the_third_place():
        t.stop.requested = next(places) == 2
        check()

    t.stop.check = check_at_the_third_place


@pytest.mark.parametrize(
    "name, settings",
    [(1, {}), (3, {"update_frequency": 3}), ("dynamic", DYNAMIC)],
    ids=["K=1", "K=3", "dynamic"],
)
def test_stops_at_any_place_change_nothing(uninterrupted, tmp_path, name, settings):
    """Every third place at which the run can stop: evaluations, between sampled batches, between updates."""
    stops, resume = 0, None
    seed_everything()
    while True:
        t = new_trainer(tmp_path, resume=resume, **settings)
        stop_at_the_third_place(t)
        if t.train(TRAIN, EVAL)["finished"]:
            break
        stops, resume = stops + 1, str(tmp_path / "run")
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 2
        seed_everything(), random.random()  # a new process has other random states
    assert stops > (4 if name == "dynamic" else 8)
    drawn = [line["queries"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert sum(drawn) == 20 and max(drawn) > 2 and (name == "dynamic" or max(drawn) == 4)
    assert record_of(tmp_path / "run") == record_of(uninterrupted[name])
    assert weights_of_run(tmp_path / "run") == weights_of_run(uninterrupted[name])


def test_an_error_after_a_draw_leaves_the_next_draws_as_they_were(uninterrupted, tmp_path):
    """The share of groups with a signal, by which draws are sized, belongs to batches that are whole."""
    seed_everything()
    t = new_trainer(tmp_path, **DYNAMIC)
    compute, calls = t._compute_log_probs, iter(range(100))
    t._compute_log_probs = lambda *args: 1 / 0 if next(calls) == 1 else compute(*args)
    with pytest.raises(ZeroDivisionError):
        t.train(TRAIN, EVAL)
    new_trainer(tmp_path, resume="latest", **DYNAMIC).train(TRAIN, EVAL)
    metrics = [record_of(run)["metrics.jsonl"] for run in (tmp_path / "run", uninterrupted["dynamic"])]
    assert [line["queries"] for line in metrics[0]] == [line["queries"] for line in metrics[1]]


def test_an_error_anywhere_is_resumed_from_the_last_whole_update(uninterrupted, tmp_path):
    seed_everything()
    t = new_trainer(tmp_path)
    rewards, calls = t.reward_fn, iter(range(100))
    t.reward_fn = lambda *args: 1 / 0 if next(calls) == 5 else rewards(*args)
    with pytest.raises(ZeroDivisionError):
        t.train(TRAIN, EVAL)
    assert (tmp_path / "run" / "checkpoints" / "step-3").exists()
    new_trainer(tmp_path, resume="latest").train(TRAIN, EVAL)
    assert record_of(tmp_path / "run") == record_of(uninterrupted[1])


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(uninterrupted, tmp_path, capsys):
    seed_everything()
    new_trainer(tmp_path).train(TRAIN, EVAL)
    newest = tmp_path / "run" / "checkpoints" / "step-6" / "training_state.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    resumed = TrainingRun(new_trainer(tmp_path, resume="latest"), TRAIN, EVAL)
    said = capsys.readouterr().err
    assert "step-6 is not used: training_state.pt is cut short" in said
    assert "step-4 is an older checkpoint" in said and "with fresh moments" in said
    assert resumed.trainer.step == 4 == len(lines_of(tmp_path / "run" / "metrics.jsonl"))
    assert not resumed.trainer.optimizer.state
    resumed.train()
    found, whole = (record_of(run)["metrics.jsonl"] for run in (tmp_path / "run", uninterrupted[1]))
    # The batch after the resume was sampled by the same weights from the same random states.
    assert found[:4] == whole[:4] and found[4]["reward_mean"] == whole[4]["reward_mean"]
    assert len(found) == len(whole) == 6 and found[5] != whole[5]


def test_a_kill_before_the_older_checkpoint_is_trimmed_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    seed_everything()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("gspo.training.training_run.drop_moments", lambda _: 1 / 0)
        new_trainer(tmp_path).train(TRAIN, EVAL)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.glob("*/optimizer_moments.pt"))) == 2
    new_trainer(tmp_path, resume="latest").train(TRAIN, EVAL)
    assert record_of(tmp_path / "run") == record_of(uninterrupted[1])
    assert weights_of_run(tmp_path / "run") == weights_of_run(uninterrupted[1])
    assert [path.parent.name for path in checkpoints.glob("*/optimizer_moments.pt")] == ["step-6"]


def test_more_epochs_go_on_where_fewer_ended(uninterrupted, tmp_path):
    seed_everything()
    new_trainer(tmp_path, num_epochs=1, eval_frequency=0).train(TRAIN, EVAL)
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 3
    new_trainer(tmp_path, resume="latest", eval_frequency=5).train(TRAIN, EVAL)
    assert [line["step"] for line in lines_of(tmp_path / "run" / "eval.jsonl")] == [0, 3, 5, 6]
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 6


def test_more_epochs_of_dynamic_sampling_are_those_of_the_longer_run(tmp_path):
    settings = {**DYNAMIC, "update_frequency": 1, "eval_frequency": 0, "reward_fn": tied_by_problem}
    for folder, epochs in (("whole", [2]), ("continued", [1, 2])):
        seed_everything()
        for i, num_epochs in enumerate(epochs):
            settings |= {"num_epochs": num_epochs, "resume": "latest" if i else None}
            new_trainer(tmp_path / folder, **settings).train(TRAIN, EVAL)
    whole, continued = (record_of(tmp_path / name / "run") for name in ("whole", "continued"))
    assert whole["metrics.jsonl"] == continued["metrics.jsonl"]
    assert weights_of_run(tmp_path / "whole" / "run") == weights_of_run(tmp_path / "continued" / "run")


def test_what_cannot_be_continued_is_named_and_left_alone(tmp_path):
    new_trainer(tmp_path).train(TRAIN, EVAL)
    run = tmp_path / "run"
    before = contents(run)
    for changed, words in (
        ({"group_size": 8, "seed": 1}, "--group_size 4 .now 8., --seed 0 .now 1"),
        ({"num_epochs": 1}, "--num_epochs 1: .* the run has come further"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainingRun(new_trainer(tmp_path, resume="latest", **changed), TRAIN, EVAL)
    with pytest.raises(ValueError, match="the problems are not those"):
        TrainingRun(new_trainer(tmp_path, resume="latest"), problems(10, seed=2), EVAL)
    assert contents(run) == before
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"batch_size": 2}))  # and as many problems
    with pytest.raises(ValueError, match="step-6 was made with --batch_size 4 .now 2"):
        TrainingRun(new_trainer(tmp_path, resume="latest", batch_size=2, num_epochs=4), TRAIN, EVAL)
    (run / "config.json").write_bytes(before[run / "config.json"])
    removed = (("metrics.jsonl", 2), ("metrics.jsonl", -1), ("eval.jsonl", 0), ("samples.jsonl", 1))
    for resume in ("latest", str(run / "checkpoints" / "step-4")):  # with lines after the checkpoint, too
        for name, line in removed:
            lines = before[run / name].splitlines(keepends=True)
            del lines[line if line >= 0 or resume == "latest" else 3]
            (run / name).write_bytes(b"".join(lines))
            with pytest.raises(ValueError, match=f"{name} lacks lines that the checkpoint follows"):
                TrainingRun(new_trainer(tmp_path, resume=resume), TRAIN, EVAL)
            (run / name).write_bytes(before[run / name])
    assert contents(run) == before
    (run / "checkpoints").rename(tmp_path / "put away")
    with pytest.raises(ValueError, match="checkpoints are missing"):
        TrainingRun(new_trainer(tmp_path, resume="latest"), TRAIN, EVAL)
    (tmp_path / "put away").rename(run / "checkpoints")
    assert contents(run) == before


def dies_after(count, patch):
    """The process, at the changes of the disk that rewinding makes."""
    calls = iter(range(100))

    def dying(change):
        return lambda *args: change(*args) if next(calls) < count else 1 / 0

    for name in ("remove", "write_whole"):
        patch.setattr(record, name, dying(getattr(record, name)))


def test_a_run_from_before_a_setting_was_there_had_its_default():
    now = asdict(GSPOConfig())
    old = {name: value for name, value in now.items() if name != "shuffle_rewards"}
    refuse_other_settings(Path("old"), old, now)
    with pytest.raises(ValueError, match="old was made with --shuffle_rewards False .now True"):
        refuse_other_settings(Path("old"), old, now | {"shuffle_rewards": True})


def test_a_kill_while_the_record_is_rewound_is_made_good(uninterrupted, tmp_path, monkeypatch):
    seed_everything()
    new_trainer(tmp_path).train(TRAIN, EVAL)
    run, older = tmp_path / "run", str(tmp_path / "run" / "checkpoints" / "step-4")
    shutil.copytree(run, tmp_path / "copy")
    new_trainer(tmp_path, resume=older).train(TRAIN, EVAL)
    from_older = record_of(run)
    shutil.rmtree(run)
    for survived in range(4):
        shutil.copytree(tmp_path / "copy", run)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            dies_after(survived, patch)
            TrainingRun(new_trainer(tmp_path, resume=older), TRAIN, EVAL)
        new_trainer(tmp_path, resume=str(run)).train(TRAIN, EVAL)
        # The newer checkpoint is the first thing to go. An older one has no moments.
        assert record_of(run) == (from_older if survived else record_of(uninterrupted[1]))
        shutil.rmtree(run)


def test_an_emergency_keeps_the_checkpoint_before_it_and_the_state_without_the_bad_update(tmp_path):
    t = new_trainer(tmp_path, save_frequency=2)
    backward, calls = t._backward, iter(range(100))

    def spoil(*args):
        computed = backward(*args)
        if next(calls) == 11:  # the second update of the fourth rollout batch
            next(t.model.parameters()).grad[0, 0] = float("nan")
        return computed

    t._backward = spoil
    with pytest.raises(EmergencyStop, match="grad_norm is nan"):
        t.train(TRAIN, EVAL)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-3"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-3" / "training_state.pt", weights_only=True)
    assert [len(batch["updates"]) for batch in state["pending"]] == [1]
    assert json.loads((tmp_path / "run" / "emergency" / "metrics.json").read_text())["grad_norm"] == "NaN"


def test_memory_that_runs_out_halves_the_pass_and_not_the_gradient(tmp_path, capsys, monkeypatch):
    """The messages are those of a GPU and of a CPU, in computing pi_old and in updating."""
    from gspo.training import forward_passes

    t = new_trainer(tmp_path)
    samples = t.collect(TRAIN[:2], 0).samples
    t._backward(samples)
    whole = [p.grad.clone() for p in t.model.parameters()]
    token_log_probs, most = forward_passes.token_log_probs, 3 * 34

    def limited(model, prompts, responses, *others):
        if sum(map(len, responses)) > most:
            raise next(errors)
        return token_log_probs(model, prompts, responses, *others)

    kinds = (
        RuntimeError("could not create a primitive"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    )
    errors = iter(kinds * 10)
    monkeypatch.setattr(forward_passes, "token_log_probs", limited)
    t.forward.retry(lambda: t._backward(samples), samples)
    for parameter, gradient in zip(t.model.parameters(), whole, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()
    assert t.forward.max_tokens < 4096 and "out of memory: from now on" in capsys.readouterr().err
    assert t.train_step(TRAIN[:2])["null_clip_fraction"] == 0
    most = 0  # not even one row: then it is an error
    with pytest.raises(RuntimeError, match="can't allocate|out of memory|primitive"):
        t.train_step(TRAIN[:2])


def test_other_errors_are_not_taken_for_want_of_memory(tmp_path):
    t = new_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="shape"):
        t.forward.retry(lambda: (_ for _ in ()).throw(RuntimeError("bad shape")), [])
    assert t.forward.halvings == 0


def test_interrupted_is_raised_where_the_state_is_whole():
    t = trainer()
    t.stop.requested = True
    with pytest.raises(Interrupted):
        t.evaluate(EVAL)


@pytest.mark.parametrize("stream", ["metrics", "samples"])
def test_an_error_while_a_batch_is_recorded_costs_nothing(uninterrupted, tmp_path, stream):
    seed_everything()
    run = TrainingRun(new_trainer(tmp_path), TRAIN, EVAL)
    sink = run.record.sinks[0]
    write = sink.write
    sink.write = lambda name, step, values: (
        1 / 0 if (name, step) == (stream, 3) else write(name, step, values)
    )
    with pytest.raises(ZeroDivisionError):
        run.train()
    new_trainer(tmp_path, resume="latest").train(TRAIN, EVAL)
    assert record_of(tmp_path / "run") == record_of(uninterrupted[1])


@pytest.mark.parametrize("stream, texts", [("eval_samples", 3), ("eval", 6)])
def test_texts_of_an_evaluation_that_was_cut_off_are_not_on_record_twice(tmp_path, stream, texts):
    """An error after some of the texts, and one between the last of them and the evaluation's line."""
    settings = {"reward_fn": shared_prefix, "num_epochs": 1}
    new_trainer(tmp_path / "whole", **settings).train(TRAIN, EVAL)
    run = TrainingRun(new_trainer(tmp_path, **settings), TRAIN, EVAL)
    sink = run.record.sinks[0]
    write = sink.write

    def write_until_then(name, step, values):
        assert (name, step) != (stream, 2) or values.get("problem", 3) < 3
        write(name, step, values)

    sink.write = write_until_then
    with pytest.raises(AssertionError):
        run.train()
    steps = [line["step"] for line in lines_of(tmp_path / "run" / "eval_samples.jsonl")]
    assert steps == [0] * 6 + [2] * texts
    new_trainer(tmp_path, resume="latest", **settings).train(TRAIN, EVAL)
    assert record_of(tmp_path / "run") == record_of(tmp_path / "whole" / "run")


def test_further_sinks_get_every_line_of_the_record(tmp_path):
    taken = []

    class Taker:
        def __init__(self, folder):
            assert (folder / "config.json").exists()

        def write(self, stream, step, values):
            taken.append((stream, {"step": step, **values}))

        def close(self):
            taken.append(("closed", None))

    TrainingRun(new_trainer(tmp_path, num_epochs=1), TRAIN, EVAL, sinks=[Taker]).train()
    assert taken.pop() == ("closed", None)
    for stream in FIELDS:
        lines = lines_of(tmp_path / "run" / f"{stream}.jsonl")
        assert lines and lines == [line for name, line in taken if name == stream]


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(tmp_path, monkeypatch):
    new_trainer(tmp_path).train(TRAIN, EVAL)
    before = contents(tmp_path)
    t = new_trainer(tmp_path, resume=str(tmp_path / "run" / "checkpoints" / "step-4"))
    t.load_state_dict = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        TrainingRun(t, TRAIN, EVAL)
    assert contents(tmp_path) == before


def test_a_trainer_that_has_trained_begins_no_run(tmp_path):
    t = new_trainer(tmp_path)
    t.train_step(TRAIN[:4])
    with pytest.raises(ValueError, match="has trained on 1"):
        t.train(TRAIN, EVAL)


def test_a_resumed_run_knows_the_best_evaluation_so_far(tmp_path):
    """best_model must not be replaced by a model that is worse than one evaluated before the resume."""
    seed_everything()
    new_trainer(tmp_path, num_epochs=1).train(TRAIN, EVAL)
    best = max(lines_of(tmp_path / "run" / "eval.jsonl"), key=pass_rate_and_reward)
    kept = contents(tmp_path / "run" / "best_model")
    run = TrainingRun(new_trainer(tmp_path, resume="latest"), TRAIN, EVAL)
    run.trainer.evaluate = lambda _: without_step(best)
    result = run.train()
    assert contents(tmp_path / "run" / "best_model") == kept
    assert result["best"] == best and result["after"]["step"] > best["step"]  # the first of equally good ones


def test_the_best_model_goes_by_pass_rate_and_then_by_mean_reward(tmp_path):
    """With a dense reward no evaluation has a pass, and the mean reward decides."""
    found = iter([(0.0, 0.3), (0.0, 0.5), (0.0, 0.4), (0.25, 0.1), (0.25, 0.1)])
    run = TrainingRun(new_trainer(tmp_path, eval_frequency=1, num_epochs=1), problems(16), EVAL)
    saved = []

    def evaluate(_):
        return without_step(EVALUATION) | dict(zip(("pass_at_1", "reward_mean"), next(found), strict=True))

    run.trainer.evaluate = evaluate
    run._save_model = lambda name, _: saved.append((name, run.trainer.step))
    result = run.train()
    assert saved == [("best_model", 0), ("best_model", 1), ("best_model", 3), ("final_model", 4)]
    assert [result[name]["step"] for name in ("before", "best", "after")] == [0, 3, 4]


def pass_rate_and_reward(line):
    return line["pass_at_1"], line["reward_mean"]


def without_step(line):
    return {name: value for name, value in line.items() if name != "step"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills, flags",
    [(50, ["--update_frequency", "2"]), (10, ["--dynamic_sampling"])],
    ids=["batches", "dynamic"],
)
def test_kills_at_random_times_change_nothing(tmp_path, kills, flags):
    soak = [sys.executable, ROOT / "tests/support/kill_soak.py", tmp_path, str(kills), *flags]
    done = subprocess.run(soak, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    whole, *killed = sorted((p for p in tmp_path.iterdir() if p.is_dir()), key=lambda p: p.name != "whole")
    assert killed
    for run in killed:
        assert record_of(run) == record_of(whole)
        assert weights_of_run(run) == weights_of_run(whole)


def test_two_signals_end_it_at_once(tmp_path):
    """The second signal comes while the first waits for a reward that does not come."""
    log = tmp_path / "log"

    def train():
        # At the usual rate of these tests a run may stop for its ratios before it hangs.
        t = new_trainer(tmp_path, save_frequency=1, kl_coef=0.0, learning_rate=1e-5)
        rewards, calls = t.reward_fn, iter(range(100))

        def hang(*args):
            if next(calls) == 4:
                print("hangs", flush=True)
                time.sleep(600)
            return rewards(*args)

        t.reward_fn = hang
        run = TrainingRun(t, TRAIN, EVAL)
        t.stop.on_signals()
        run.train()

    process = forked(train, log)
    wait_for(lambda: log.exists() and "hangs" in log.read_text(), process)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(process, signal.SIGTERM)  # as a launcher passes it on
    time.sleep(1)
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
    os.kill(process, signal.SIGINT)
    assert exit_code_of(process) == 130
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert checkpoints and all(name.startswith("step-") for name in checkpoints)
