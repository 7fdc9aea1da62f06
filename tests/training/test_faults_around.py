"""What goes wrong around a run: the disk is full, the judges of rewards die."""

import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from data_loader import load_problems
from gspo.sandbox import SandboxError
from gspo.tasks import rewards
from gspo.tasks.rewards import RewardFunction
from gspo.training.alarms import EmergencyStop
from gspo.training.checkpoints import STATE_FILE, checkpoints_in
from gspo.training.record import JsonLines, Record
from gspo.training.whole_folders import CannotSave, damage
from support.records import record_of
from support.runs import EVAL, TRAIN, new_trainer, seed_everything
from support.sorting import trainer


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    seed_everything()
    new_trainer(folder).train(TRAIN, EVAL)
    return folder / "run"


def fill(disk, left: int) -> None:
    stat = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(stat.f_bavail * stat.f_frsize - left))


# Calls of the reward function: 0 evaluation, 1 and 2 batches, 3 evaluation, 4 and 5, 6 evaluation, 7, 8, 9.
@pytest.mark.parametrize(
    ("call", "left", "what"),
    [
        (0, 100_000, "best_model"),
        (1, 0, "jsonl"),
        (2, 300_000, "checkpoints/step-2"),
        (5, 300_000, "checkpoints/step-4"),
        (9, 100_000, "final_model"),
    ],
)
def test_a_full_disk_is_said_and_nothing_is_lost(small_disk, uninterrupted, call, left, what):
    seed_everything()
    t = new_trainer(small_disk)
    reward_fn, calls = t.reward_fn, iter(range(100))

    def fill_and_judge(*args):
        if next(calls) == call:
            fill(small_disk, left)
        return reward_fn(*args)

    t.reward_fn = fill_and_judge
    with pytest.raises(CannotSave, match=f"cannot write .*{what}.*: .*(No space left|failed|writer)"):
        t.train(TRAIN, EVAL)
    run = small_disk / "run"
    assert [damage(path, STATE_FILE) for path in checkpoints_in(run)] == [None] * len(checkpoints_in(run))
    assert not list(run.rglob("*.partial"))
    (small_disk / "filler").unlink()
    if not checkpoints_in(run):
        seed_everything()  # it starts again
    assert new_trainer(small_disk, resume=str(run)).train(TRAIN, EVAL)["finished"]
    assert record_of(run) == record_of(uninterrupted)


def test_a_run_goes_on_when_its_judges_are_killed():
    """Each worker, while it judges and while it idles."""
    judge, killed = RewardFunction(), []
    t = trainer(batch_size=4, max_new_tokens=8)
    t.reward_fn = judge
    sums = load_problems("math", "train", 4)
    t.train_step(sums)  # the workers are up

    def kill_all():
        for worker in list(rewards._graders(os.getpid())._workers):
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(worker.process.pid)

    kill_all()
    assert t.train_step(sums)["unjudged_responses"] == 0
    timer = threading.Timer(0.02, kill_all)
    timer.start()
    slow = [SimpleNamespace(**vars(problem)) for problem in sums for _ in range(50)]
    assert None not in judge(slow, [f"\\boxed{{\\frac{{{i}}}{{7}}}}" for i in range(200)])
    timer.join()
    assert len(killed) >= 2


def test_a_reward_that_hangs_is_not_judged(monkeypatch):
    """A worker that does not come back is killed at its deadline; the others' verdicts stand."""
    pool = rewards._graders(os.getpid())
    monkeypatch.setattr(pool, "timeout_s", 1.0)
    judge, sums = RewardFunction(), load_problems("math", "train", 6)
    judge(sums[:2], ["1", "2"])  # the workers are up
    stopped = pool._workers[0]
    os.kill(stopped.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    judged = judge(sums, [problem.answer for problem in sums])
    assert judged.count(None) == 1 and judged.count(1.0) == 5 and time.monotonic() - started < 20


def test_without_the_sandbox_code_is_not_judged_and_the_others_are(monkeypatch):
    def gone(*_):
        raise SandboxError("the sandbox does not start")

    code, sums = load_problems("code", "train", 2), load_problems("math", "train", 2)
    monkeypatch.setattr(rewards, "run_tests", gone)
    t = trainer(batch_size=4, mini_batch_size=4, max_new_tokens=8, max_length=1000)
    t.reward_fn = RewardFunction()
    with pytest.warns(UserWarning, match="8 of 8 programs were not judged: the sandbox does not start"):
        assert t.train_step([*code, *sums])["unjudged_responses"] == 8
    with pytest.warns(UserWarning), pytest.raises(EmergencyStop, match="no response .* could be judged"):
        t.train_step(code)


def test_what_the_model_writes_stays_data(tmp_path):
    """Terminal escapes, markup and line ends in a response are one line of plain ASCII in the record."""
    record = Record(tmp_path, [JsonLines(tmp_path)])
    hostile = '\x1b[2J\x1b]0;owned\x07\n<script>alert(1)</script>\u202e{"step": 7}'
    record.add_samples(1, [{"response": hostile}])
    (line,) = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert line.isascii() and b"\x1b" not in line and b"\x07" not in line
