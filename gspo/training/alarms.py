"""When a run should be looked at, and when it must stop: rules over its metrics, and measures of its text.

The rules are pure functions of metrics, oldest first (run_record.GLOSSARY). What the model's text is like is
measured against the run's own start: a model may always have rambled.
"""

import math
from collections.abc import Sequence

# Rollout batches in a row that a rule on text or ties looks at.
WINDOW = 5
REPEATED_RUN = 4  # tokens


# ---- what is measured of text


def repetition(response_ids: Sequence[int]) -> float:
    """Share of a response's runs of REPEATED_RUN tokens that stood in it before; 0 where there are no two."""
    runs = list(zip(*(response_ids[i:] for i in range(REPEATED_RUN)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def unreadable_characters(text: str) -> float:
    """Share of control, unassigned and replacement characters; 0 for an empty text."""
    readable = sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text)
    return 1 - readable / len(text) if text else 0.0


# ---- emergency stops


class EmergencyStop(RuntimeError):
    """Training cannot go on; the weights are those before the update that went bad.

    metrics: what is known of that update, and shows why.
    """

    def __init__(self, reason: str, metrics: dict | None = None):
        super().__init__(reason)
        self.metrics = metrics or {}


def stop_if(reason: str | None, metrics: dict | None = None) -> None:
    """Raises EmergencyStop where there is a reason."""
    if reason:
        raise EmergencyStop(reason, metrics)


def stop_reason(metrics: dict) -> str | None:
    """Why what these metrics describe must not reach the weights, or None.

    Any figure that is not finite; a ratio above 100 (a healthy one stays within a few per cent of 1); samples
    that are not the policy's.
    """
    for name, values in metrics.items():
        for value in values if isinstance(values, list) else [values]:
            if not math.isfinite(value):
                return f"{name} is {value}"
    if metrics.get("importance_ratio_max", 1) > 100:
        return f"importance_ratio_max is {metrics['importance_ratio_max']:.4g}, above 100"
    if metrics.get("sampler_gap", 0) > 1:
        return (
            f"sampler_gap is {metrics['sampler_gap']:.3g} nats per token: the responses were not sampled "
            "from the policy (stale weights in the sampler?)"
        )
    return None


def gibberish_reason(history: Sequence[dict]) -> str | None:
    """Why the policy's text is beyond repair, or None: it has changed for the worse for WINDOW rollout
    batches, in which less than a tenth of the start's reward was earned."""
    if not any(batch["reward_mean"] for batch in _start(history)):
        return None  # nothing has been lost
    faults = _text_faults(history, reward_kept=0.1)
    return f"gibberish: {faults[0]}, and next to nothing was rewarded" if faults else None


# ---- warnings


def warnings_of(history: Sequence[dict]) -> dict[str, str]:
    """What a user should look at, read off the metric history (oldest first): kind to message."""
    last, warnings = history[-1], {}
    lowest, highest = last["importance_ratio_min"], last["importance_ratio_max"]
    if highest > 10 or lowest < 0.1:
        warnings["ratio"] = (
            f"importance ratios reach {lowest:.3g} to {highest:.3g}: the policy moves far in one rollout "
            "batch; lower --learning_rate"
        )
    if last["clip_fraction"] > 0.8:
        warnings["clip"] = (
            f"{last['clip_fraction']:.0%} of tokens are clipped: most of the batch teaches nothing; "
            "lower --learning_rate or widen the clip range"
        )
    if last["null_clip_fraction"] > 0.01:
        warnings["null clip"] = (
            f"null_clip_fraction is {last['null_clip_fraction']:.3g}: scoring noise alone leaves the clip "
            "range; use --dtype float32 or a wider range"
        )
    first_gap = next((batch["sampler_gap"] for batch in history if batch["sampler_gap"]), 0.0)
    if last["sampler_gap"] > 3 * max(1e-3, first_gap):
        warnings["stale sampler"] = (
            f"sampler and scorer differ by {last['sampler_gap']:.3g} nats per token, at the start by "
            f"{first_gap:.3g}: does the sampler get the new weights?"
        )
    if len(history) >= WINDOW and all(batch["zero_variance_groups"] == 1 for batch in history[-WINDOW:]):
        warnings["no signal"] = (
            f"no learning signal: in {WINDOW} rollout batches every group's rewards were equal; "
            "try an easier --difficulty, a larger --group_size or a stronger model"
        )
    if faults := _text_faults(history, reward_kept=1.0):
        warnings["text"] = f"the text changes for the worse: {'; '.join(faults)}; look at samples.jsonl"
    first, latest = _mean(history[:10], "loss"), _mean(history[-10:], "loss")
    if len(history) >= 30 and latest > first + 1:
        warnings["loss"] = f"the loss has risen from {first:.3g} to {latest:.3g}"
    return warnings


def _text_faults(history: Sequence[dict], reward_kept: float) -> list[str]:
    """What is worse in each of the last WINDOW rollout batches than at the start.

    None while they earn more than reward_kept of the start's reward: a model that learns to answer in one
    token has not collapsed.
    """
    start, recent = _start(history), history[-WINDOW:]
    if not start or _mean(recent, "reward_mean") > reward_kept * _mean(start, "reward_mean"):
        return []
    signs = {
        "entropy": ("entropy {:.3g} nats per token, {:.3g} at the start", [
            lambda x, first: x > 3 * max(1.0, first), lambda x, first: x < 0.05 * first]),
        "response_tokens_mean": ("responses of {:.3g} tokens, {:.3g} at the start", [
            lambda x, first: x < 0.2 * first]),
        "repetition": ("{:.0%} of the text is repetition, {:.0%} at the start", [
            lambda x, first: x > max(0.5, 2 * first)]),
        "unreadable_characters": ("{:.0%} of the characters are unreadable, {:.0%} at the start", [
            lambda x, first: x > first + 0.1]),
        "truncated_fraction": ("{:.0%} of the responses do not end, {:.0%} at the start", [
            lambda x, first: x >= 0.9 and first < 0.5]),
    }  # fmt: skip
    return [
        message.format(_mean(recent, name), _mean(start, name))
        for name, (message, rules) in signs.items()
        if any(all(rule(batch[name], _mean(start, name)) for batch in recent) for rule in rules)
    ]


def _start(history: Sequence[dict]) -> Sequence[dict]:
    """The first WINDOW rollout batches, less those among the last WINDOW: a run may break at once."""
    return history[:-WINDOW][:WINDOW]


def _mean(history, name):
    return sum(batch[name] for batch in history) / len(history)
