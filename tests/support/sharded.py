"""Work that test_shards.py has several processes do, and compares with that of one."""

from pathlib import Path

import torch
from torch import distributed

from gspo.policy.sharded_model import whole_tensor
from support.sorting import problems, trainer

torch.set_num_threads(1)


def two_updates(folder, shard, *settings):
    """Train on two rollout batches of two updates each. The main process saves what came of it."""
    settings = dict(pair.split("=") for pair in settings)
    name = settings.pop("name", "tiny")
    settings = {key: float(value) if "." in value else int(value) for key, value in settings.items()}
    t = trainer(name, shard=shard, batch_size=6, mini_batch_size=3, learning_rate=1e-3, **settings)
    gradients = []
    step = t.optimizer.step

    def keep_gradients_and_step():
        gradients.append([whole_tensor(p.grad).clone() for p in t.weights.parameters])
        step()

    t.optimizer.step = keep_gradients_and_step
    metrics = [t.train_step(problems(6, seed)) for seed in (1, 2)]
    weights = [whole_tensor(p.detach()).clone() for p in t.weights.parameters]
    if t.processes.is_main:
        Path(folder).mkdir(exist_ok=True)
        torch.save((metrics, gradients, weights), Path(folder) / "result.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()
