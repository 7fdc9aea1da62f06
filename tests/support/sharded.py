"""Work that several processes do in test_shards.py, to be compared with that of one."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.fsdp import fully_shard

import gspo.training.adamw_8bit as adamw_8bit_module
import gspo_implementation
import train_gspo
from gspo.policy.log_probs import token_log_probs
from gspo.policy.sharded_model import call, copy_whole, is_first_process, is_sharded, whole_tensor
from gspo.training import processes, training_run
from gspo.training.adamw_8bit import AdamW8bit
from gspo.training.rollout_engine import ShardedEngine
from gspo.training.sharded_checkpoint import whole_moments
from support.runs import tied_by_problem
from support.sorting import problems, shared_prefix, trainer

SETTINGS = {"batch_size": 6, "mini_batch_size": 3, "learning_rate": 1e-3}


def train(path, cases):
    """Train on two rollout batches in each of several cases, given as JSON; save what came of it.

    A case has a name, the name of the model, the settings of its trainer, and "tied": most groups are.
    """
    torch.set_num_threads(1)
    results = {}
    for case in json.loads(cases):
        torch.manual_seed(0)
        reward = tied_by_problem if case.get("tied") else shared_prefix
        t = trainer(case.get("model", "tiny"), reward, **(SETTINGS | case["settings"]))
        results[case["name"]] = _trained(t)
    if is_first_process():
        torch.save(results, Path(path))


def adamw_8bit(path):
    """Save weights and moments after three steps of AdamW8bit with gradients from a seed."""
    adamw_8bit_module.CHUNK = 1024  # shorter than a tensor, and than a part of one
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator).bfloat16()

    shapes = ((7, 512), (11,), (3, 100), (5, 2, 256), (1, 256))
    module = torch.nn.Module()
    for i, shape in enumerate(shapes):
        setattr(module, f"weights_{i}", torch.nn.Parameter(random(shape)))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        fully_shard(module)
    parameters = list(module.parameters())
    optimizer = AdamW8bit(parameters, 1e-3, weight_decay=0.1, seed=4)
    for _ in range(3):
        for parameter, shape in zip(parameters, shapes, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            copy_whole(parameter.grad, random(shape))
        optimizer.step()
    weights = [whole_tensor(parameter.detach()) for parameter in parameters]
    moments = whole_moments(optimizer.state_dict()["state"])
    if is_first_process():
        torch.save((weights, moments), path)


def _trained(t):
    gradients = []
    step = t.weights.optimizer.step

    def keep_gradients_and_step(*arguments):
        gradients.append([whole_tensor(parameter.grad).clone() for parameter in t.weights.parameters])
        step(*arguments)

    t.weights.optimizer.step = keep_gradients_and_step
    passes = []
    micro_batches = t.forward.micro_batches

    def count_passes(model, samples):
        split = micro_batches(model, samples)
        passes.append([len(split), sum(not rows for rows in split)])
        return split

    t.forward.micro_batches = count_passes
    metrics = [t.train_step(problems(6, seed)) for seed in (1, 2)]
    return {
        "metrics": metrics,
        "gradients": gradients,
        "weights": [whole_tensor(parameter.detach()).clone() for parameter in t.weights.parameters],
        "responses": [text["responses"] for text in _evaluated(t)],
        "sharded": is_sharded(t.model),
        "passes": t.processes.gather([passes]),
    }


def _evaluated(t):
    t.evaluate(problems(5, 9))
    return t.evaluation_texts


def empty_responses(path):
    """Save the gradient of four rows, two for each of two processes; those of the second have no tokens."""
    torch.set_num_threads(1)
    t = trainer("tiny", shard="full" if "RANK" in os.environ else "none")
    rows = [([5, 6, 7], [8, 9]), ([7, 6], [5]), ([8, 9], []), ([9, 8], [])]
    rank, count = t.processes.rank, t.processes.count
    own = rows[len(rows) // count * rank : len(rows) // count * (rank + 1)]
    log_probs = call(
        t.model, token_log_probs, [prompt for prompt, _ in own], [response for _, response in own]
    )
    assert [len(row) for row in log_probs] == [len(response) for _, response in own]
    sum(row.sum() for row in log_probs).backward()
    gradients = [whole_tensor(parameter.grad) for parameter in t.weights.parameters]
    if t.processes.is_main:
        torch.save(gradients, path)


# ---- runs of train_gspo.py with something that happens to them: `torchrun sharded.py NAME FLAGS ...`


def killed_in_save(flags):
    """Rank 1 is killed when half of its part of the third checkpoint is written."""
    save, calls = dcp.save, iter(range(1000))

    def save_or_die(tensors, **settings):
        if os.environ["RANK"] == "1" and next(calls) == 5:  # two calls for each checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, **settings)

    dcp.save = save_or_die
    return train_gspo.main(flags)


def stopped_in_evaluation(flags):
    """The main process is asked to stop in the middle of the second evaluation, with all weights gathered."""
    gspo_implementation.EVALUATION_CHUNK = 1
    generate, calls = ShardedEngine.generate, iter(range(1000))

    def generate_and_stop(*arguments):
        if (
            os.environ["RANK"] == "0" and next(calls) == 4
        ):  # after 2 in the first evaluation and 2 in training
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments)

    ShardedEngine.generate = generate_and_stop
    return train_gspo.main(flags)


def slow_to_save(flags):
    """The processes wait for 15 s in the middle of a computation, and the first model takes 20 s to write."""
    processes.COMPUTING_PATIENCE_MIN = 15 / 60
    write, calls = training_run.save_tokenizer, iter(range(1000))

    def write_slowly(*arguments):
        if next(calls) == 0:
            time.sleep(20)
        write(*arguments)

    training_run.save_tokenizer = write_slowly
    return train_gspo.main(flags)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
