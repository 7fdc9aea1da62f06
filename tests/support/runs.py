"""Short runs of the trainer with every part of its state in use."""

import random

import numpy as np
import torch

from support.sorting import problems, shared_prefix, trainer

TRAIN, EVAL = problems(10), problems(6, seed=1)


def noisy(asked, responses):
    """A reward that draws from every global random state there is."""
    noise = 0.01 * (random.random() + np.random.rand() + torch.rand(()).item())
    return [reward + noise for reward in shared_prefix(asked, responses)]


def tied_for_some(asked, responses):
    """The same, but all responses to problems that begin with an even digit earn nothing."""
    return _tied(asked, noisy(asked, responses))


def tied_by_problem(asked, responses):
    """A reward that depends on nothing else, tied for the same problems."""
    return _tied(asked, shared_prefix(asked, responses))


def _tied(asked, rewards):
    return [r if int(p.id[0]) % 2 else 0.0 for p, r in zip(asked, rewards, strict=True)]


def new_trainer(folder, reward_fn=noisy, **other):
    settings = {"num_epochs": 2, "eval_frequency": 2, "save_frequency": 2, "output_dir": str(folder)}
    settings |= {"run_name": "run", "learning_rate": 1e-3, "warmup_steps": 7, "kl_coef": 0.01}
    return trainer(reward_fn=reward_fn, **(settings | other))


def seed_everything():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


def whole_and_resumed(folder, train, held_out, **settings):
    """Train without interruption, and once more with a stop after the first rewards of training.

    Returns the trainer and the run folder of the first, and the run folder of the second.
    """
    seed_everything()
    whole = new_trainer(folder / "whole", **settings)
    assert whole.train(train, held_out)["finished"]
    calls = iter(range(1000))

    def stop_after_two_calls(asked, responses):
        stopped.stop.requested = next(calls) == 1  # the first call is that of an evaluation
        return noisy(asked, responses)

    seed_everything()
    stopped = new_trainer(folder / "stopped", stop_after_two_calls, **settings)
    assert not stopped.train(train, held_out)["finished"]
    resumed = new_trainer(folder / "stopped", resume="latest", **settings)
    assert resumed.train(train, held_out)["finished"]
    return whole, folder / "whole" / "run", folder / "stopped" / "run"


def stop_and_resume(folder, **settings):
    """A run that is stopped after its third rollout batch, and resumed to its end."""
    stopped = new_trainer(folder, **settings)
    finish = stopped.finish_batch

    def finish_and_stop():
        finish()
        stopped.stop.requested = stopped.step == 3

    stopped.finish_batch = finish_and_stop
    assert not stopped.train(TRAIN, EVAL)["finished"]
    assert new_trainer(folder, resume="latest", **settings).train(TRAIN, EVAL)["finished"]
