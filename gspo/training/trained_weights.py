"""What is trained of a model, with which optimizer, and how it is saved and loaded.

A trainer and a run know only TrainedWeights. `trained_weights` makes it from the configuration.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.saved_model import load_weights, save_model
from gspo.training.config import GSPOConfig


class TrainedWeights(Protocol):
    """The policy, and what of it is trained.

    Attributes:
        model: the policy, on the device, in evaluation mode.
        parameters: those that are trained.
        optimizer: makes their updates.
    """

    model: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def starting_model(self) -> AbstractContextManager[Any]:
        """The model as it was before training, for the KL term; without gradients."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write into a folder what load_checkpoint() reads: the trained weights exactly."""

    def load_checkpoint(self, folder: Path) -> None:
        """Take the trained weights of save_checkpoint()."""

    def save_model(self, folder: Path) -> None:
        """Write the trained model, in the type that it came in, into a folder that from_pretrained loads."""


def trained_weights(model: Any, config: GSPOConfig, device: torch.device) -> TrainedWeights:
    """Prepare a model for training on a device as the resolved configuration says. The model is changed."""
    return AllWeights(model, config, device)


def move(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with all weights on a device and in a type.

    A model that is there already is left alone: torch cannot convert parameters without memory (plan.py).
    """
    if all(p.device == device and p.dtype == dtype for p in model.parameters()):
        return model
    return model.to(device).to(dtype)  # parameter by parameter: each is freed in its old type


class AllWeights:
    """All weights in float32, trained by AdamW."""

    def __init__(self, model: Any, config: GSPOConfig, device: torch.device):
        self.saved_dtype: torch.dtype = model.dtype
        self.model = move(model, device, torch.float32).eval()
        self.parameters = list(self.model.parameters())
        self._start = deepcopy(self.model).requires_grad_(False) if config.kl_coef else None
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        assert config.learning_rate is not None  # resolve() has decided it
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    @contextmanager
    def starting_model(self) -> Iterator[Any]:
        assert self._start is not None, "it is kept only for a KL term"
        yield self._start

    def save_checkpoint(self, folder: Path) -> None:
        save_model(self.model, folder)

    def load_checkpoint(self, folder: Path) -> None:
        load_weights(self.model, folder)

    def save_model(self, folder: Path) -> None:
        save_model(self.model, folder, self.saved_dtype)
