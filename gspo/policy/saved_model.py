"""Write a model into a folder that from_pretrained loads, and read weights back into a model."""

from pathlib import Path
from typing import Any

import torch


def save_model(model: Any, folder: Path) -> None:
    """Write the weights and the configuration."""
    model.save_pretrained(folder)


def load_weights(model: Any, folder: Path) -> None:
    """Give the model the weights of save_model(). They keep the model's type and device."""
    saved = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())
