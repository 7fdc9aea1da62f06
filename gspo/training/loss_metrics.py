"""The metrics of a loss: sums over sequences and tokens, which add up, and the averages that they give."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# What a loss counts, or the trainer beside it. Sums add up over micro-batches, updates and processes.
METRIC_SUMS = (
    "sequences", "clipped_sequences",
    "tokens", "clipped_tokens", "eligible_tokens", "eligible_left_tokens", "eligible_right_tokens",
    "ratios", "ratio_deviations", "ratio_deviations_squared", "loss_sum", "kl_sum",
    "sampler_gap_sum", "sampler_gap_responses",
    "expert_choices", "changed_experts",
)  # fmt: skip
# Sums that are there only with a KL term, or where the routing of a mixture of experts is measured.
OPTIONAL_SUMS = ("kl_sum", "expert_choices", "changed_experts")


def loss_metrics(
    ratio: torch.Tensor,
    clipped_left: torch.Tensor,
    clipped_right: torch.Tensor,
    eligible: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, float]:
    """The metrics of one call of a loss: sums, and their averages; unread inside `unread_metrics`.

    ratio: (B, 1) per sequence or (B, T) per token. The others are (B, T) bool: tokens clipped below and above
    the range, tokens that can clip since they have an advantage, and all tokens.
    """
    has_tokens = mask.any(1)
    counted = mask if ratio.shape == mask.shape else has_tokens[:, None]
    # float64, since the square of a ratio overflows float32. No ratio is picked by its place: a GPU would be
    # waited for until it knows how many there are.
    deviations = torch.where(counted, ratio.double() - 1, 0.0)
    sums = {
        "sequences": has_tokens.sum(),
        "clipped_sequences": (clipped_left | clipped_right).any(1).sum(),
        "tokens": mask.sum(),
        "clipped_tokens": (clipped_left | clipped_right).sum(),
        "eligible_tokens": eligible.sum(),
        "eligible_left_tokens": clipped_left.sum(),
        "eligible_right_tokens": clipped_right.sum(),
        "ratios": counted.sum(),
        "ratio_deviations": deviations.sum(),
        "ratio_deviations_squared": deviations.square().sum(),
        "importance_ratio_min": torch.where(counted, ratio, torch.inf).min(),
        "importance_ratio_max": torch.where(counted, ratio, -torch.inf).max(),
    }
    return read_metrics(sums) if _READ_AT_ONCE.get() else sums


# Whether loss_metrics() reads its figures.
_READ_AT_ONCE = ContextVar("read_at_once", default=True)


@contextmanager
def unread_metrics() -> Iterator[None]:
    """Inside, a loss leaves the figures of its metrics on the device, so that a GPU is not waited for."""
    token = _READ_AT_ONCE.set(False)
    try:
        yield
    finally:
        _READ_AT_ONCE.reset(token)


def read_metrics(figures: dict) -> dict[str, float]:
    """The metrics as floats, with their averages, from those that `unread_metrics` has left on the device."""
    unread = {name: value for name, value in figures.items() if isinstance(value, torch.Tensor)}
    # In one tensor, so that a GPU is waited for once.
    read = torch.stack([value.double() for value in unread.values()]).tolist() if unread else []
    sums = figures | dict(zip(unread, read, strict=True))
    lowest, highest = sums.pop("importance_ratio_min"), sums.pop("importance_ratio_max")
    if not sums["ratios"]:
        lowest = highest = 1.0
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
    left, right = sums["eligible_left_tokens"], sums["eligible_right_tokens"]
    tokens = max(num_tokens or sums["tokens"], 1)
    eligible = max(sums["eligible_tokens"], 1)
    return {
        **sums,
        "clip_fraction": sums["clipped_tokens"] / tokens,
        "clip_fraction_eligible": (left + right) / eligible,
        "clip_fraction_left": left / eligible,
        "clip_fraction_right": right / eligible,
        "eligible_fraction": sums["eligible_tokens"] / tokens,
        "clip_fraction_sequences": sums["clipped_sequences"] / max(num_sequences or sums["sequences"], 1),
        "importance_ratio_mean": 1 + mean_deviation,
        "importance_ratio_std": math.sqrt(max(mean_square - mean_deviation**2, 0.0)),
        "importance_ratio_min": lowest,
        "importance_ratio_max": highest,
    }


def pool_metrics(parts: Iterable[dict[str, float]], num_sequences: int, num_tokens: int) -> dict[str, float]:
    """The metrics of a whole from those of its parts: micro-batches, updates, processes.

    Args:
        parts: what loss_metrics() returned for each, with loss_sum, the sums of the sampler's gap, and
            perhaps OPTIONAL_SUMS.
        num_sequences, num_tokens: those of the whole. It may have sequences without a signal, which are in no
            part: they add 0 to the loss and cannot clip. They have no KL either, and stay out of its mean.
    """
    parts = [part for part in parts if part["ratios"]]
    sums = {name: sum(part[name] for part in parts if name in part) for name in METRIC_SUMS}
    for name in OPTIONAL_SUMS:
        if not any(name in part for part in parts):
            del sums[name]
    lowest = min((part["importance_ratio_min"] for part in parts), default=1.0)
    highest = max((part["importance_ratio_max"] for part in parts), default=1.0)
    metrics = {"loss": sums["loss_sum"] / num_sequences}
    metrics |= _with_averages(sums, lowest, highest, num_sequences, num_tokens)
    metrics["sampler_gap"] = sums["sampler_gap_sum"] / max(sums["sampler_gap_responses"], 1)
    if "kl_sum" in sums:
        metrics["kl"] = sums["kl_sum"] / max(sums["sequences"], 1)
    if "expert_choices" in sums:
        metrics["routing_changed"] = sums["changed_experts"] / max(sums["expert_choices"], 1)
    return metrics


def none_eligible(part: dict[str, float]) -> dict[str, float]:
    """The metrics of a part of the first update after sampling.

    Its ratios are 1 but for rounding. Tokens that rounding alone puts outside the clip range are in
    clip_fraction, and not among those that can clip. Likewise its experts are those of pi_old.
    """
    never = {"eligible_tokens", "eligible_left_tokens", "eligible_right_tokens"}
    never |= {"expert_choices", "changed_experts"} & part.keys()
    return part | dict.fromkeys(never, 0)


def without_gap(part: dict[str, float]) -> dict[str, float]:
    """The metrics of a part of an update in which the sampler's gap cannot be told from what was learnt."""
    return part | {"sampler_gap_sum": 0, "sampler_gap_responses": 0}


def without_sums(metrics: dict[str, float]) -> dict[str, float]:
    """The averages, which are what is logged."""
    return {name: value for name, value in metrics.items() if name not in METRIC_SUMS}
