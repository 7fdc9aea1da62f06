"""The metrics of a loss: sums over sequences and tokens, which add up, and the averages that they give."""

import math
from collections.abc import Iterable

import torch

# What a loss counts, or the trainer beside it. Sums add up over micro-batches, updates and processes.
METRIC_SUMS = (
    "objective", "sequences", "clipped_sequences", "tokens", "clipped_tokens",
    "ratios", "ratio_deviations", "ratio_deviations_squared", "kl_sum", "sampler_gap_sum",
)  # fmt: skip


def loss_metrics(
    objective: torch.Tensor, ratio: torch.Tensor, clipped: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """Sums and averages over one call: objective (), ratio (B, 1) or (B, T), clipped and mask (B, T)."""
    has_tokens = mask.any(1)
    # float64, since the square of a ratio overflows float32.
    ratios = ratio[mask if ratio.shape == mask.shape else has_tokens].double()
    deviations = ratios - 1
    none = ratios.new_ones(1)  # min() and max() need an element
    # One tensor, so that a GPU is waited for once.
    figures = torch.stack(
        [
            objective.double(),
            has_tokens.sum().double(),
            clipped.any(1).sum().double(),
            mask.sum().double(),
            clipped.sum().double(),
            deviations.sum(),
            deviations.square().sum(),
            (ratios if len(ratios) else none).min(),
            (ratios if len(ratios) else none).max(),
        ]
    ).tolist()
    names = ("objective", "sequences", "clipped_sequences", "tokens", "clipped_tokens",
             "ratio_deviations", "ratio_deviations_squared")  # fmt: skip
    *counted, lowest, highest = figures
    sums = dict(zip(names, counted, strict=True)) | {"ratios": float(len(ratios))}
    return _with_averages(sums, lowest, highest)


def _with_averages(
    sums: dict[str, float],
    lowest: float,
    highest: float,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, float]:
    """The sums, and the averages that they give over so many sequences and tokens (by default their own)."""
    mean_deviation = sums["ratio_deviations"] / max(sums["ratios"], 1)
    mean_square = sums["ratio_deviations_squared"] / max(sums["ratios"], 1)
    return {
        **sums,
        "clip_fraction": sums["clipped_tokens"] / max(num_tokens or sums["tokens"], 1),
        "clip_fraction_sequences": sums["clipped_sequences"] / max(num_sequences or sums["sequences"], 1),
        "importance_ratio_mean": 1 + mean_deviation,
        "importance_ratio_std": math.sqrt(max(mean_square - mean_deviation**2, 0.0)),
        "importance_ratio_min": lowest,
        "importance_ratio_max": highest,
    }


def pool_metrics(
    parts: Iterable[dict[str, float]], num_sequences: int, num_tokens: int, kl_coef: float = 0.0
) -> dict[str, float]:
    """The metrics of a whole from those of its parts: micro-batches, updates, processes.

    Args:
        parts: what loss_metrics() returned for each, with kl_sum and sampler_gap_sum.
        num_sequences, num_tokens: those of the whole. It may have sequences without a signal, which are in no
            part: they add 0 to the loss and cannot clip.
        kl_coef: the weight of the KL penalty in the loss.
    """
    parts = [part for part in parts if part["ratios"]]
    sums = {name: sum(part.get(name, 0.0) for part in parts) for name in METRIC_SUMS}
    lowest = min((part["importance_ratio_min"] for part in parts), default=1.0)
    highest = max((part["importance_ratio_max"] for part in parts), default=1.0)
    metrics = _with_averages(sums, lowest, highest, num_sequences, num_tokens)
    metrics["loss"] = (kl_coef * sums["kl_sum"] - sums["objective"]) / num_sequences
    metrics["sampler_gap"] = sums["sampler_gap_sum"] / max(sums["sequences"], 1)
    if kl_coef:
        metrics["kl"] = sums["kl_sum"] / num_sequences
    return metrics
