"""The trainer on the tiny model and its own task, sorting digits: real updates, in seconds."""

from dataclasses import dataclass

import torch

from gspo.policy.model_loader import load_model
from gspo_implementation import GSPOConfig, GSPOTrainer


@dataclass(frozen=True)
class Sort:
    """Short enough that a few hundred updates cost seconds."""

    id: str
    answer: str

    @property
    def prompt(self):
        return f"{self.id}="


def problems(count, seed=0):
    digits = torch.randint(10, (count, 13), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Sort("".join(map(str, row)), "".join(map(str, sorted(row)))) for row in digits]


def shared_prefix(asked, responses):
    """A reward with few ties: the share of digits that are right from the left."""
    rewards = []
    for problem, response in zip(asked, responses, strict=True):
        right = next(
            (i for i, (a, b) in enumerate(zip(problem.answer, response, strict=False)) if a != b), None
        )
        right = min(len(problem.answer), len(response)) if right is None else right
        rewards.append(right / len(problem.answer))
    return rewards


def trainer(name="tiny", reward_fn=shared_prefix, **settings):
    settings = {
        "group_size": 4,
        "max_new_tokens": 20,
        "learning_rate": 2e-4,
        "device": "cpu",
        "dtype": "float32",
    } | settings
    model, tokenizer = load_model(name, device="cpu")
    return GSPOTrainer(model, tokenizer, GSPOConfig(model_name=name, **settings), reward_fn)


def weights_of(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])
