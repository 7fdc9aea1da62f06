"""Runs of train_gspo.py of which one rank alone fails: `torchrun one_fails.py WHERE FLAGS ...`."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from unittest.mock import patch

import torch.distributed.checkpoint as dcp
from torch import distributed

import train_gspo
from gspo.policy.sharded_model import local_part
from gspo.policy.vllm_server import EngineError
from gspo.tasks.rewards import RewardFunction
from gspo.training.processes import Processes
from gspo.training.record import Record
from gspo.training.rollout_engine import ShardedEngine
from gspo_implementation import GSPOTrainer


def spoil_gradient(sum_gradients, group, parameters):
    """Make one value not finite in this rank's part of a gradient."""
    sum_gradients(group, parameters)
    local_part(parameters[1].grad).view(-1)[0] = math.nan


def spoil_weights(finish_batch, trainer):
    """The same with a weight, after an update."""
    finish_batch(trainer)
    local_part(trainer.weights.parameters[1].data).view(-1)[0] = math.inf


def save_on_a_full_disk(save, *arguments, **settings):
    """Write no file of more than 10,000 bytes, as on a disk that is full for this rank alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        save(*arguments, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# The rank that fails, the function, which of its calls (from 0), and an error or what is done instead. The
# first rewards and samples are those of an evaluation, and the first two losses those of null_clip_fraction.
FAILURES = {
    "reward": (1, RewardFunction, "__call__", 2, KeyError("a bug in the reward")),
    "refusal": (1, RewardFunction, "__call__", 2, ValueError("a reward that is refused")),
    "sampling": (1, ShardedEngine, "generate", 2, RuntimeError("a bug in sampling")),
    "engine": (1, ShardedEngine, "generate", 2, EngineError("the server is gone")),
    "record": (0, Record, "add_metrics", 1, KeyError("a bug in the record")),
    "loss": (1, GSPOTrainer, "_loss", 2, RuntimeError("a bug in the loss")),
    "memory": (1, GSPOTrainer, "_loss", 2, RuntimeError("CUDA out of memory. Tried to allocate")),
    "gradient": (1, Processes, "sum_gradients", 1, spoil_gradient),
    "weights": (1, GSPOTrainer, "finish_batch", 0, spoil_weights),
    "disk": (1, dcp, "save", 2, save_on_a_full_disk),  # two calls for each checkpoint
}


def errors(folder):
    """Write what each process raises if some fail in each(), or the main one in on_main()."""
    group = Processes("cpu")
    found = []

    def note(do, *arguments):
        try:
            found.append(do(*arguments))
        except Exception as error:
            assert group.shared_error is error
            found.append([type(error).__name__, str(error)])

    def fail(*of_ranks):
        error = of_ranks[group.rank]
        if error is not None:
            raise error
        return group.rank

    bug, unlucky = KeyError("bug"), UnicodeDecodeError("utf-8", b"", 0, 1, "odd")  # which str() cannot make
    for of_ranks in ((None, None), (None, bug), (None, EngineError("gone")), (unlucky, bug), (unlucky, None)):
        note(group.each, fail, *of_ranks)
        note(group.on_main, fail, *of_ranks)
    assert group.gather([group.rank]) == [0, 1]  # all are where they were
    Path(folder, f"{group.rank}.json").write_text(json.dumps(found))


def main(where, flags):
    rank, owner, name, last, failure = FAILURES[where]
    work, calls = getattr(owner, name), iter(range(1000))

    def fail(*arguments, **settings):
        if os.environ["RANK"] == str(rank) and next(calls) == last:
            if isinstance(failure, Exception):
                raise failure
            return failure(work, *arguments, **settings)
        return work(*arguments, **settings)

    with patch.object(owner, name, fail):
        try:
            return train_gspo.main(flags)
        finally:
            if distributed.is_initialized():
                print("has not left the other processes", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
