"""What the curves show: the panels of training_curves.png and the charts of report.html, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass

from gspo.report.verdict import CLIP_BAND

BY_MINIBATCH = "clip_fraction_by_minibatch"
MOST_MINIBATCHES = 8
# A line of each metric's mean over its neighbours is drawn over the values of this many batches or more.
LEAST_TO_SMOOTH = 30


@dataclass(frozen=True)
class Panel:
    """Some metrics over the rollout batches.

    lines: metric to label. Where runs are overlaid, the first one stands for the panel.
    spread: metrics of the lower and the upper edge of an area around it.
    stacked: those of the lines that the picture draws as areas on each other.
    second: those with an axis of their own, for a share.
    band: the values of a healthy run.
    top: what the vertical axis reaches at least, from 0 on; 0: it follows the values.
    alarms: kinds of the warnings that belong here.
    """

    title: str
    lines: dict[str, str]
    spread: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    band: tuple[float, ...] = ()
    top: float = 0.0
    alarms: tuple[str, ...] = ()


REWARD = Panel("Reward and held-out pass@1", {"reward_mean": "mean reward"}, top=0.1, alarms=("held-out",))
CLIPPING = Panel(
    "Clip fraction",
    {"clip_fraction_eligible": "of what can clip", "clip_fraction": "of all"},
    band=CLIP_BAND,
    top=0.4,
    alarms=("clip", "clips most", "clips nothing", "null clip"),
)
RATIO = Panel(
    "Importance ratio",
    {"importance_ratio_mean": "mean"},
    spread=("importance_ratio_min", "importance_ratio_max"),
    alarms=("ratio", "sequence ratio", "ratio spread", "stale sampler"),
)
GRADIENT = Panel("Gradient norm", {"grad_norm": "before clipping"}, alarms=("gradient",))
LENGTH = Panel(
    "Response length",
    {"response_tokens_mean": "tokens", "truncated_fraction": "share cut off (right axis)"},
    second=("truncated_fraction",),
    alarms=("text",),
)
ENTROPY = Panel("Entropy", {"entropy": "nats per token"}, alarms=("entropy",))
TIED = Panel(
    "Tied groups",
    {"zero_variance_groups": "tied", "groups_all_right": "all right", "groups_all_wrong": "all wrong"},
    stacked=("groups_all_right", "groups_all_wrong"),
    top=1.0,
    alarms=("no signal",),
)
SECONDS = {
    "generation_s": "sampling",
    "reward_s": "rewards",
    "log_prob_s": "log-probs",
    "update_s": "updates",
}
TIME = Panel("Seconds per rollout batch", SECONDS, stacked=tuple(SECONDS))
PANELS = (REWARD, CLIPPING, RATIO, GRADIENT, LENGTH, ENTROPY, TIED, TIME)


def minibatches(metrics: Sequence[dict]) -> dict[str, list[float | None]]:
    """The clip fraction of each minibatch after the first, which cannot clip: label to a value per batch."""
    most = max((len(batch[BY_MINIBATCH]) for batch in metrics), default=0)
    return {
        f"minibatch {i + 1}": [
            batch[BY_MINIBATCH][i] if i < len(batch[BY_MINIBATCH]) else None for batch in metrics
        ]
        for i in range(1, min(most, MOST_MINIBATCHES))
    }


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, a twentieth of all on either side."""
    reach = len(values) // 20
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
