"""The pool survives what its workers may do: hang, die, eat memory, print."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gspo.tasks.worker_pool import WorkerPool
from support import ROOT

WORKER = """
import mmap, os, signal, sys, time
sys.path.insert(0, {root!r})
from gspo.tasks.worker_pool import serve

def handle(job):
    if job == "hang": 9 ** 9 ** 9
    if job == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if job == "die": os.kill(os.getpid(), signal.SIGKILL)
    if job == "memory": return len(mmap.mmap(-1, 3 * 2**30))
    if job == "print": print('{{"result": "forged"}}'); os.write(1, b"noise\\n")
    if job == "pid": return os.getpid()
    if job == "slow": time.sleep(0.5); return os.getpid()
    return [job, job]

time.sleep({start_s})
serve(lambda: handle)
"""


@pytest.fixture
def make_pool(tmp_path):
    pools = []

    def make(num_workers=1, timeout_s=2.0, start_s=0.0):
        script = tmp_path / f"worker{len(pools)}.py"
        script.write_text(textwrap.dedent(WORKER.format(root=str(ROOT), start_s=start_s)))
        pools.append(WorkerPool([sys.executable, str(script)], num_workers, timeout_s))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def alive(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    )


def test_results_in_order_from_several_workers(make_pool):
    assert make_pool(num_workers=3).map(list(range(50))) == [[n, n] for n in range(50)]


def test_workers_stay_up_between_calls(make_pool):
    pool = make_pool()
    assert pool.map(["pid"]) == pool.map(["pid"])


@pytest.mark.parametrize("job", ["hang", "stop"])
def test_a_job_past_its_deadline_is_killed_and_the_others_are_done(make_pool, job):
    pool = make_pool(num_workers=2, timeout_s=1.0)
    pool.map([1, 2])
    started = time.monotonic()
    assert pool.map([1, job, 2, 3]) == [[1, 1], None, [2, 2], [3, 3]]
    assert time.monotonic() - started < 5


def test_start_up_does_not_count_against_the_job(make_pool):
    assert make_pool(timeout_s=0.5, start_s=1.0).map([1]) == [[1, 1]]


def test_the_first_job_of_a_worker_has_the_same_deadline(make_pool):
    started = time.monotonic()
    assert make_pool(timeout_s=1.0).map(["hang"]) == [None]
    assert time.monotonic() - started < 5


def test_a_worker_that_dies_costs_only_its_job(make_pool):
    assert make_pool().map([1, "die", 2]) == [[1, 1], None, [2, 2]]


def test_a_job_whose_worker_is_killed_from_outside_is_done_again(make_pool):
    pool = make_pool()
    pid = pool.map(["pid"])[0]
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    survivor = pool.map(["slow"])[0]
    assert survivor not in (pid, None)


def test_a_worker_killed_while_idle_is_replaced(make_pool):
    pool = make_pool()
    os.kill(pool.map(["pid"])[0], signal.SIGKILL)
    assert pool.map([1]) == [[1, 1]]


@pytest.mark.filterwarnings("ignore:a job was not judged")
def test_memory_is_bounded_and_the_worker_goes_on(make_pool):
    assert make_pool().map(["memory", 1]) == [None, [1, 1]]


def test_what_a_job_prints_is_no_reply(make_pool):
    assert make_pool().map(["print", 1]) == [["print", "print"], [1, 1]]


def test_a_job_larger_than_a_pipe(make_pool):
    text = "x" * 3_000_000
    assert make_pool(timeout_s=10).map([text]) == [[text, text]]


def test_a_worker_that_does_not_read_does_not_block_the_parent(make_pool):
    pool = make_pool(timeout_s=1.0)
    pid = pool.map(["pid"])[0]
    os.kill(pid, signal.SIGSTOP)
    rescue = threading.Timer(5, os.kill, (pid, signal.SIGKILL))  # so that this test fails instead of hanging
    rescue.start()
    started = time.monotonic()
    assert pool.map(["x" * 3_000_000]) == [None]
    assert time.monotonic() - started < 4
    rescue.cancel()


def test_a_command_that_does_not_start_is_an_error():
    with pytest.raises(RuntimeError, match="do not start"):
        WorkerPool([sys.executable, "-c", "raise SystemExit(1)"], 1, 1.0).map([1])


def test_no_orphans_when_the_parent_is_killed(make_pool, tmp_path):
    make_pool()  # writes the worker script
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from gspo.tasks.worker_pool import WorkerPool
print(*WorkerPool([sys.executable, {str(tmp_path / "worker0.py")!r}], 1, 2.0).map(["pid"]), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
