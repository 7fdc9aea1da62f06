"""What a loss refuses: tensors whose shapes do not agree, and clip ranges that are not positive."""

import torch


def check_ranges(left: float, right: float) -> None:
    """Raises ValueError unless both clip ranges are positive."""
    if not (left > 0 and right > 0):
        raise ValueError(f"clip ranges must be positive, got left {left} and right {right}")


def check_shapes(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    advantages_per_token: bool,
) -> None:
    """Raises ValueError unless log_probs, old_log_probs and mask are (B, T) and mask is bool.

    advantages may be (B,), and (B, T) with advantages_per_token.
    """
    shape = tuple(mask.shape)
    allowed = [shape[:1], shape] if advantages_per_token else [shape[:1]]
    if mask.dim() != 2 or log_probs.shape != mask.shape or old_log_probs.shape != mask.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)}, old_log_probs {tuple(old_log_probs.shape)} and mask "
            f"{shape} must all be (B, T)"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if tuple(advantages.shape) not in allowed:
        raise ValueError(f"advantages {tuple(advantages.shape)} must be {' or '.join(map(str, allowed))}")
