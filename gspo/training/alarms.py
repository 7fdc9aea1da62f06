"""Warnings, emergency stops, and the measures of text that they read.

The rules are pure functions of the metrics (record.GLOSSARY) of one rollout batch, or of all, oldest first.
A text is compared with the run's own start, because a model may have rambled from the beginning.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

from gspo.training.intervals import Z, paired_interval

if TYPE_CHECKING:
    import torch

# The rules on text, ties, ratios, gradient norm and entropy look at this many rollout batches in a row.
WINDOW = 5
# The rule on the sampler looks at this many in a row. In bfloat16 the rounding of one rollout batch of short
# responses may be three times that of the first one.
STALE_WINDOW = 3
# The rules on the clip fraction look at this many in a row.
CLIP_WINDOW = 10
# An update with an importance ratio outside these bounds is not made; the lower one is for whole responses.
LOWEST_RATIO, HIGHEST_RATIO = 0.01, 100.0
# The ratios of whole responses stay within these bounds in a healthy run.
LOWEST_SEQUENCE_RATIO, HIGHEST_SEQUENCE_RATIO = 0.8, 1.25
# Tokens of a sequence that counts as repeated when it occurs a second time.
REPEATED_TOKENS = 4


# ---- measures of a response's text


def repetition(response_ids: Sequence[int]) -> float:
    """The share of sequences of REPEATED_TOKENS tokens that occurred before; 0 for a short response."""
    shifted = [response_ids[i:] for i in range(REPEATED_TOKENS)]
    sequences = list(zip(*shifted, strict=False))
    if not sequences:
        return 0.0
    return 1 - len(set(sequences)) / len(sequences)


def unreadable_characters(text: str) -> float:
    """The share of control, unassigned and replacement characters; 0 for an empty text."""
    if not text:
        return 0.0
    readable = sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text)
    return 1 - readable / len(text)


# ---- emergency stops


# The share of responses that --mismatch_mask may mask before a warning, and before a stop.
MASKED_WARNING, MASKED_STOP = 0.1, 0.5
# The advice of emergency stops before a rollout batch is trained on: because nothing could be judged, and
# because too much is masked.
MEND_REWARD = "Mend the reward and continue with --resume"
MEND_MISMATCH = (
    "A small model needs --dtype float32, in a new run; else raise --mismatch_mask and continue with --resume"
)


class EmergencyStop(RuntimeError):
    """Training must not go on; the weights are those before the update that went wrong.

    metrics: what is known about that update, as evidence. batch: the rollout batch, if it is not the one that
    is being trained on. advice: what to do, if it is not a lower learning rate.
    """

    def __init__(
        self, reason: str, metrics: dict | None = None, batch: Any = None, advice: str | None = None
    ):
        super().__init__(reason)
        self.metrics = metrics or {}
        self.batch = batch
        self.advice = advice


def stop_if(reason: str | None, metrics: dict | None = None) -> None:
    """Raises EmergencyStop if there is a reason."""
    if reason:
        raise EmergencyStop(reason, metrics)


def non_finite_weights(model: "torch.nn.Module") -> str | None:
    """Name the weights that are not finite, or return None. Collective if they are sharded."""
    import torch  # here, since gspo.report reads these rules without it

    from gspo.policy.sharded_model import whole_tensor

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # The norm is fast, since no mask of all weights is made.
    if whole_tensor(torch.nn.utils.get_total_norm(parameters.values())).isfinite():
        return None
    broken = [
        name
        for name, parameter in parameters.items()
        if not whole_tensor(torch.nn.utils.get_total_norm([parameter])).isfinite()
    ]
    return f"{len(broken)} weight tensors are not finite, such as {broken[0]}" if broken else None


def stop_reason(metrics: dict, clips_per_token: bool = False) -> str | None:
    """The reason why an update with these metrics must not reach the weights, or None.

    Reasons are a figure that is not finite, a ratio above HIGHEST_RATIO or below LOWEST_RATIO, and responses
    that were not sampled from the policy.

    clips_per_token: as in GRPO. The smallest of its many token ratios is below LOWEST_RATIO in runs that
        learn (docs/alarms.md), so the lower bound is not for them.
    """
    for name, values in metrics.items():
        for value in values if isinstance(values, list) else [values]:
            if not math.isfinite(value):
                return f"{name} is {value}"
    if metrics.get("importance_ratio_max", 1) > HIGHEST_RATIO:
        return f"importance_ratio_max is {metrics['importance_ratio_max']:.4g}, above {HIGHEST_RATIO:g}"
    if metrics.get("importance_ratio_min", 1) < LOWEST_RATIO and not clips_per_token:
        return f"importance_ratio_min is {metrics['importance_ratio_min']:.4g}, below {LOWEST_RATIO:g}"
    if metrics.get("sampler_gap", 0) > 1:
        return (
            f"sampler_gap is {metrics['sampler_gap']:.3g} nats per token: the responses were not sampled "
            "from the policy (stale weights in the sampler?)"
        )
    return None


def gibberish_reason(history: Sequence[dict]) -> str | None:
    """The reason why the policy's text is beyond repair, or None.

    The text has got worse for WINDOW rollout batches, which earned less than a tenth of the reward at the
    start.
    """
    if not any(batch["reward_mean"] for batch in _start(history)):
        return None  # nothing has been lost
    faults = _text_faults(history, reward_kept=0.1)
    return f"gibberish: {faults[0]}, and next to nothing was rewarded" if faults else None


def unjudged_reason(history: Sequence[dict], window: int = WINDOW) -> str | None:
    """The reason why there is nothing to learn from, or None.

    No response could be judged in `window` rollout batches in a row. A few problems that the reward cannot
    judge do not end a run; a reward that judges nothing ends it in its first evaluation.
    """
    recent = history[-window:]
    if len(recent) == window and all(map(_nothing_judged, recent)):
        batches = "the rollout batch" if window == 1 else f"the last {window} rollout batches"
        return f"no response of {batches} could be judged"
    return None


def mismatch_reason(history: Sequence[dict]) -> str | None:
    """The reason why sampler and trainer are too different to train on, or None."""
    recent = [batch["masked_fraction"] for batch in history if "masked_fraction" in batch][-WINDOW:]
    if len(recent) < WINDOW or min(recent) < MASKED_STOP:
        return None
    return (
        f"in {WINDOW} rollout batches {MASKED_STOP:.0%} or more of the responses were masked, because "
        "sampler and trainer differ on them by more than --mismatch_mask"
    )


def _nothing_judged(batch: dict) -> bool:
    """True if no response of a rollout batch has a reward.

    A group with a judged response is all right, all wrong, or not tied.
    """
    return batch["zero_variance_groups"] == 1 and batch["groups_all_right"] == batch["groups_all_wrong"] == 0


# ---- warnings


def warnings_of(history: Sequence[dict], clips_per_token: bool = False) -> dict[str, str]:
    """The warnings that the metrics so far call for (oldest first): kind to message.

    clips_per_token: as in GRPO. In its healthy runs hardly any token clips, and the ratios of single tokens
        are far from 1.
    """
    last, warnings = history[-1], {}
    lowest, highest = last["importance_ratio_min"], last["importance_ratio_max"]
    if highest > 10 or lowest < 0.1:
        warnings["ratio"] = (
            f"importance ratios reach {lowest:.3g} to {highest:.3g}: the policy moves far in one rollout "
            "batch; lower --learning_rate"
        )
    if last["clip_fraction"] > 0.8:
        warnings["clip"] = (
            f"{last['clip_fraction']:.0%} of tokens are clipped: most of the batch has no gradient; "
            "lower --learning_rate or widen the clip range"
        )
    could_clip = [batch for batch in history if batch["eligible_fraction"]]
    warnings |= _clip_range_warnings(could_clip, clips_per_token)
    if not clips_per_token:
        warnings |= _sequence_ratio_warnings(could_clip)
    warnings |= _gradient_warnings([batch for batch in history if batch["grad_norm"]])
    measured = (batch["null_clip_fraction"] for batch in reversed(history) if "null_clip_fraction" in batch)
    noise = next(measured, 0.0)
    if noise > 0.01:
        warnings["null clip"] = (
            f"null_clip_fraction is {noise:.3g}: the noise of the log-probabilities alone leaves the clip "
            "range; use --dtype float32, --pi_old trainer or a wider range"
        )
    first_gap = next((batch["sampler_gap"] for batch in history if batch["sampler_gap"]), 0.0)
    gaps = [batch["sampler_gap"] for batch in history[-STALE_WINDOW:]]
    if len(gaps) == STALE_WINDOW and min(gaps) > 3 * max(1e-3, first_gap):
        warnings["stale sampler"] = (
            f"the log-probabilities of sampler and trainer differ by {last['sampler_gap']:.3g} nats per "
            f"token, at the start by {first_gap:.3g}: does the sampler get the new weights?"
        )
    masked = last.get("masked_fraction", 0)
    if masked > MASKED_WARNING:
        warnings["mismatch"] = (
            f"{masked:.0%} of the responses get no gradient, because sampler and trainer differ on them by "
            "more than --mismatch_mask: let both compute in the same type, in float32 if the model is small"
        )
    recent = history[-WINDOW:]
    if len(recent) == WINDOW and all(batch["zero_variance_groups"] == 1 for batch in recent):
        warnings["no signal"] = (
            f"no learning signal: in {WINDOW} rollout batches every group's rewards were equal; "
            "try an easier --difficulty, a larger --group_size or a stronger model"
        )
    elif (
        len(recent) == WINDOW
        and all(batch["grad_norm"] == 0 for batch in recent)
        and masked <= MASKED_WARNING  # else that is why
    ):
        warnings["no signal"] = (
            f"no learning signal: in {WINDOW} rollout batches no update was made, although rewards differed; "
            "with --dynamic_sampling pass, a group needs responses that pass and responses that do not: take "
            "--dynamic_sampling reward"
        )
    start = _start(history)
    if start and all(batch["entropy"] < 0.1 * _mean(start, "entropy") for batch in recent):
        warnings["entropy"] = (
            f"entropy has fallen to {_mean(recent, 'entropy'):.3g} nats per token from "
            f"{_mean(start, 'entropy'):.3g} at the start: groups will tie and nothing new is tried; take "
            "best_model and stop, lower --learning_rate, or use more or harder problems, not more epochs"
        )
    if faults := _text_faults(history, reward_kept=1.0):
        warnings["text"] = f"the text gets worse: {'; '.join(faults)}; look at samples.jsonl"
    return warnings


def _clip_range_warnings(history: Sequence[dict], clips_per_token: bool) -> dict[str, str]:
    """Warnings about a clip range that clips nearly everything or nothing, from batches that could clip."""
    warnings = {}
    spreads = [batch["ratio_spread"] for batch in history[-WINDOW:]]
    if len(spreads) == WINDOW and min(spreads) > 10:
        spread = sum(spreads) / WINDOW
        warnings["ratio spread"] = (
            f"half of the responses that can clip are more than {spread:.3g} clip ranges from 1: the clip "
            "range acts as zero at this learning rate and response length; lower --learning_rate, or widen "
            f"--left_clip_range and --right_clip_range about {spread / 3:.0f} times"
        )
    shares = [batch["clip_fraction_eligible"] for batch in history[-CLIP_WINDOW:]]
    if len(shares) == CLIP_WINDOW and min(shares) > 0.6:
        warnings["clips most"] = (
            f"in {CLIP_WINDOW} rollout batches more than 60 % of the tokens that can clip were clipped, the "
            f"last time {shares[-1]:.0%}: most responses teach nothing after the first update; lower "
            "--learning_rate or widen the clip range"
        )
    if len(shares) == CLIP_WINDOW and max(shares) < 0.01 and not clips_per_token:
        warnings["clips nothing"] = (
            f"in {CLIP_WINDOW} rollout batches less than 1 % of the tokens that can clip were clipped, the "
            f"last time {shares[-1]:.1%}: the clip range has no effect; raise --learning_rate or narrow the "
            "clip range"
        )
    return warnings


def _sequence_ratio_warnings(history: Sequence[dict]) -> dict[str, str]:
    """A warning about ratios of whole responses far from 1, from batches that could clip."""
    recent = history[-WINDOW:]
    far = [
        batch["importance_ratio_min"] < LOWEST_SEQUENCE_RATIO
        or batch["importance_ratio_max"] > HIGHEST_SEQUENCE_RATIO
        for batch in recent
    ]
    if len(far) < WINDOW or not all(far):
        return {}
    lowest, highest = recent[-1]["importance_ratio_min"], recent[-1]["importance_ratio_max"]
    return {
        "sequence ratio": (
            f"in {WINDOW} rollout batches a response's importance ratio was outside "
            f"{LOWEST_SEQUENCE_RATIO} to {HIGHEST_SEQUENCE_RATIO}, the last time they reached {lowest:.3g} "
            f"to {highest:.3g}: the policy moves far in one rollout batch; lower --learning_rate"
        )
    }


def _gradient_warnings(history: Sequence[dict]) -> dict[str, str]:
    """A warning about gradient norms far above those at the start, from batches with an update.

    max_grad_norm says nothing here: AdamW divides by the gradient's own size, so a norm that is always above
    it is healthy.
    """
    start, recent = _start(history), history[-WINDOW:]
    if not start:
        return {}
    at_start = median(batch["grad_norm"] for batch in start)
    if min(batch["grad_norm"] for batch in recent) <= 10 * at_start:
        return {}
    return {
        "gradient": (
            f"in {WINDOW} rollout batches the gradient norm was more than ten times that of the start, the "
            f"last time {recent[-1]['grad_norm']:.3g} against {at_start:.3g}: training becomes unstable; "
            "lower --learning_rate, and go back to best_model if the reward falls"
        )
    }


def held_out_fall(evaluations: Sequence[dict]) -> str | None:
    """A warning if the last evaluation is significantly below the best one before it, else None.

    The two are compared problem by problem. The best of several evaluations is the best partly by luck, so
    the interval is widened as for that many comparisons (Bonferroni).
    """
    if len(evaluations) < 2 or len(evaluations[-1]["pass_by_problem"]) < 2:
        return None
    *earlier, last = evaluations
    widening = NormalDist().inv_cdf(1 - 0.025 / len(earlier)) / Z
    for name, by_problem in (("pass_at_1", "pass_by_problem"), ("reward_mean", "reward_by_problem")):
        best = max(earlier, key=lambda evaluation: evaluation[name])
        change, _, high = paired_interval(best[by_problem], last[by_problem])
        if change + widening * (high - change) < 0:
            return (
                f"held-out {name} has fallen to {last[name]:.3g} from {best[name]:.3g} at rollout batch "
                f"{best['step']}, by more than chance, paired by problem: take best_model and stop, or lower "
                "--learning_rate"
            )
    return None


# What can get worse about a text: the metric, a message about its recent mean and its mean at the start, and
# a rule that compares a recent value with the mean at the start.
Rule = Callable[[float, float], bool]
ENTROPY = "entropy {:.3g} nats per token, {:.3g} at the start"
LENGTH = "responses of {:.3g} tokens, {:.3g} at the start"
REPEATED = "{:.0%} of the text is repetition, {:.0%} at the start"
UNREADABLE = "{:.0%} of the characters are unreadable, {:.0%} at the start"
ENDLESS = "{:.0%} of the responses do not end, {:.0%} at the start"
TEXT_SIGNS: list[tuple[str, str, Rule]] = [
    ("entropy", ENTROPY, lambda recent, start: recent > 3 * max(1.0, start)),
    ("entropy", ENTROPY, lambda recent, start: recent < 0.05 * start),
    ("response_tokens_mean", LENGTH, lambda recent, start: recent < 0.2 * start),
    ("repetition", REPEATED, lambda recent, start: recent > max(0.5, 2 * start)),
    ("unreadable_characters", UNREADABLE, lambda recent, start: recent > start + 0.1),
    ("truncated_fraction", ENDLESS, lambda recent, start: recent >= 0.9 and start < 0.5),
]


def _text_faults(history: Sequence[dict], reward_kept: float) -> list[str]:
    """What is worse in each of the last WINDOW rollout batches than at the start.

    The list is empty as long as they earn more than reward_kept times the reward at the start: a model that
    learns to answer in one token has not collapsed.
    """
    start, recent = _start(history), history[-WINDOW:]
    if not start or _mean(recent, "reward_mean") > reward_kept * _mean(start, "reward_mean"):
        return []
    faults = []
    for name, message, rule in TEXT_SIGNS:
        at_start = _mean(start, name)
        if all(rule(batch[name], at_start) for batch in recent):
            faults.append(message.format(_mean(recent, name), at_start))
    return faults


def _start(history: Sequence[dict]) -> Sequence[dict]:
    """The first WINDOW rollout batches, without those among the last WINDOW: a run may collapse at once."""
    return history[:-WINDOW][:WINDOW]


def _mean(history: Sequence[dict], name: str) -> float:
    return sum(batch[name] for batch in history) / len(history)
