"""What a run's record says about it, in a few sentences: its state, what it learned, its health, what to do.

Pure functions. Thresholds and advice are those of gspo.training.alarms and gspo.training.findings.
"""

from collections.abc import Sequence
from statistics import fmean

from gspo.report.run_record import RunRecord, batches
from gspo.training.alarms import TEXT_SIGNS, WINDOW
from gspo.training.findings import NEARLY_NOTHING, Figures, Finding, findings
from gspo.training.intervals import describe_gain, paired_interval

# Clipped tokens in a healthy run of GSPO, as a share of those that can clip.
CLIP_BAND = (0.10, 0.30)
# A run that earns less than this share of what it earned at its start has collapsed.
REWARD_KEPT = 0.1
# Names of findings for which the first sentence says more than the finding's name.
TIED = {"too hard": "Tied from the start, because the problems are too hard",
        "too easy": "Tied from the start, because the problems are too easy",
        "tied groups": "Tied from the start", "cut off": "Responses are cut off"}  # fmt: skip


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the most important one first."""
    if not run.metrics:
        return [_state(run), *_emergency(run), *_what_it_learned(run)]
    fall = collapse(run)
    at_start = obstacles(run, run.metrics[:WINDOW])
    headline = _headline(run, fall, at_start)
    sentences = [headline, _state(run), *_emergency(run), *_what_it_learned(run)]
    if fall:
        return sentences + [_describe_collapse(run, fall)]
    sentences += [f"In {_span(run.metrics[:WINDOW])}, {finding.message}." for finding in at_start]
    if len(run.metrics) >= 2 * WINDOW:
        known = {finding.name for finding in at_start}
        late = [found for found in obstacles(run, run.metrics[-WINDOW:]) if found.name not in known]
        sentences += [f"At the end, in {_span(run.metrics[-WINDOW:])}, {found.message}." for found in late]
    return sentences + _health(run, at_start)


def _headline(run: RunRecord, fall: int | None, at_start: Sequence[Finding]) -> str:
    """The outcome in a line."""
    if fall:
        what = "Gibberish" if text_faults(run) else "Collapsed"
        return f"{what}: from rollout batch {fall} on, next to nothing was rewarded."
    if run.emergency:
        return f"Collapsed: emergency stop in rollout batch {run.emergency['step']}."
    for finding in at_start:
        return f"{TIED.get(finding.name, finding.name.capitalize())}."
    gain = _gain(run)
    if gain is None:
        outcome = "It is not known yet whether it learns"
    elif gain[1] > 0:
        outcome = "It learned"
    elif gain[2] < 0:
        outcome = "It got worse"
    else:
        outcome = "No difference seen"
    return f"{outcome}, {'with warnings' if run.alarms else 'and no alarm was raised'}."


# ---- the state of the run


def _state(run: RunRecord) -> str:
    drawn = sum(batch["queries"] for batch in run.metrics)
    done = f"after {batches(run.step, run.step)}" if run.step else "before its first rollout batch"
    if run.finished:
        return f"The run is finished: {len(run.metrics)} rollout batches, {drawn} queries."
    if run.emergency:
        return f"The run was stopped {done}."
    if run.going:
        return f"The run is still going: it is {done}."
    return f"The run ended early, {done} ({drawn} queries): interrupted or killed; --resume continues it."


def _emergency(run: RunRecord) -> list[str]:
    if not run.emergency:
        return []
    return [
        f"Emergency stop in rollout batch {run.emergency['step']}, before an update: "
        f"{run.emergency['reason']}. The evidence is in emergency/. At learning rate "
        f"{run.setting('learning_rate', 0):g} start anew, or from best_model, with a lower --learning_rate."
    ]


# ---- what it learned


def _gain(run: RunRecord) -> tuple[float, float, float] | None:
    """Gain in mean reward by the last evaluation, paired by problem, with its interval; None if unknown."""
    first, last = run.evaluations[:1], run.evaluations[-1:]
    if not run.evaluations or last == first or len(first[0]["pass_by_problem"]) < 2:
        return None
    return max(
        (paired_interval(first[0][key], last[0][key]) for key in ("pass_by_problem", "reward_by_problem")),
        key=lambda gain: max(gain[1], -gain[2]),
    )


def _what_it_learned(run: RunRecord) -> list[str]:
    if not run.evaluations:
        return ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    if before is after:
        low, high = before["interval_95"]
        start = f"Held-out pass@1 was {before['pass_at_1']:.3f} ({low:.3f} to {high:.3f}) "
        start += f"{_when(before)}, and has not been evaluated since"
        return [start + _reward_in_training(run) + "."]
    names = {"pass@1": ("pass_at_1", "pass_by_problem"), "mean reward": ("reward_mean", "reward_by_problem")}
    if all(e["pass_by_problem"] == e["reward_by_problem"] for e in (before, after)):
        del names["mean reward"]
    sentences = []
    for name, (mean, by_problem) in names.items():
        gain = describe_gain(before[by_problem], after[by_problem]).replace("  ", " ")
        sentences.append(
            f"Held-out {name} went from {before[mean]:.3f} {_when(before)} to {after[mean]:.3f} "
            f"{_when(after)}: a gain of {gain}, paired over {len(before[by_problem])} problems."
        )
    gain = _gain(run)
    if gain and gain[1] <= 0 <= gain[2]:
        sentences.append(
            "Such a change is within chance; more held-out problems (--num_eval_samples) or more training "
            "would tell more."
        )
    return sentences


def _reward_in_training(run: RunRecord) -> str:
    if len(run.metrics) < 2 * WINDOW:
        return ""
    first, last = run.metrics[:WINDOW], run.metrics[-WINDOW:]
    return f"; the mean reward in training went from {_mean(first):.3f} to {_mean(last):.3f}"


def _when(evaluation: dict) -> str:
    return f"after {batches(evaluation['step'], evaluation['step'])}" if evaluation["step"] else "before"


# ---- obstacles to learning and the health of the updates


def obstacles(run: RunRecord, metrics: Sequence[dict]) -> list[Finding]:
    """The findings about some rollout batches, from their metrics: the same that a run prints at its start.

    Of the responses that were cut, those among samples.jsonl tell how many earned a reward. What needs all
    responses (the form of the answers) is left out.
    """
    queries = sum(batch["queries"] for batch in metrics)
    size = max(1, round(run.setting("group_size", 1)))

    def count(name: str, unit: int = 1) -> int:
        return round(sum(batch[name] * batch["queries"] * unit for batch in metrics))

    cut = [sample for sample in run.samples if sample.get("finished") is False]
    paid = [sample for sample in cut if isinstance(reward := sample.get("reward"), float) and reward > 0]
    rewards = {batch["reward_mean"] for batch in metrics}
    is_constant = len(rewards) == 1 and not any(batch["reward_std"] for batch in metrics)
    unjudged = sum(round(batch["unjudged_responses"]) for batch in metrics)
    truncated = count("truncated_fraction", size)
    max_new_tokens = round(run.setting("max_new_tokens", 0)) or None
    at_most_new = [sample for sample in cut if sample.get("tokens") == max_new_tokens]
    figures = Figures(
        groups=queries,
        responses=queries * size,
        with_signal=queries - count("zero_variance_groups"),
        all_right=count("groups_all_right"),
        all_wrong=count("groups_all_wrong"),
        reward_mean=_mean(metrics),
        only_reward=rewards.pop() if is_constant and unjudged < queries * size else None,
        only_reward_passes=count("groups_all_right") > 0,
        unjudged=unjudged,
        tokens_mean=fmean(batch["response_tokens_mean"] for batch in metrics),
        tokens_longest=0,
        truncated=truncated,
        truncated_rewarded=round(truncated * len(paid) / max(1, len(cut))),
        truncated_by="max_new_tokens" if 2 * len(at_most_new) >= len(cut) else "max_length",
        answerable=0,
        with_answer=0,
        with_other_answer=0.0,
        has_chat_template=True,
        max_length=round(run.setting("max_length", 0)),
        max_new_tokens=max_new_tokens,
    )
    return findings(figures) if queries else []


def collapse(run: RunRecord) -> int | None:
    """The first rollout batch from which on next to nothing was rewarded, though something was at the start.

    None if there is none, or if fewer than WINDOW batches follow.
    """
    first_evaluation = [evaluation["reward_mean"] for evaluation in run.evaluations[:1]]
    start = max([_mean(run.metrics[:WINDOW]), *first_evaluation])
    if start <= NEARLY_NOTHING or _mean(run.metrics[-WINDOW:]) > REWARD_KEPT * start:
        return None
    first = len(run.metrics)
    while first and run.metrics[first - 1]["reward_mean"] <= REWARD_KEPT * start:
        first -= 1
    return run.metrics[first]["step"] if len(run.metrics) - first >= WINDOW else None


def text_faults(run: RunRecord) -> list[str]:
    """What is worse about the text of the last WINDOW rollout batches than about that of the first batch."""
    first, recent = run.metrics[0], run.metrics[-WINDOW:]
    return [
        message.format(fmean(batch[name] for batch in recent), first[name])
        for name, message, rule in TEXT_SIGNS
        if all(rule(batch[name], first[name]) for batch in recent)
    ]


def _describe_collapse(run: RunRecord, fall: int) -> str:
    faults = text_faults(run)
    text = f" The text: {'; '.join(faults)}." if faults else ""
    return (
        f"The mean reward fell from {_mean(run.metrics[: max(1, fall - 1)][:WINDOW]):.3f} to "
        f"{_mean(run.metrics[-WINDOW:]):.3f} in {_span(run.metrics[-WINDOW:])}.{text} Read samples.jsonl, and "
        f"start anew with a lower --learning_rate (now {run.setting('learning_rate', 0):g})."
    )


def _health(run: RunRecord, at_start: Sequence[Finding]) -> list[str]:
    """Clipping, ratios and alarms."""
    updated = [batch for batch in run.metrics if batch["grad_norm"]]
    can_clip = [batch for batch in updated if batch["eligible_fraction"]]
    sentences = []
    if updated and not can_clip:
        sentences.append(
            "Nothing could clip: pi_old was refreshed after every optimizer update, so the importance ratio "
            "is 1 by construction and all algorithms are the same; for clipping, let --mini_batch_size (now "
            f"{run.setting('mini_batch_size', 0):g}) be a part of --batch_size "
            f"({run.setting('batch_size', 0):g})."
        )
    elif can_clip:
        eligible = sum(batch["eligible_fraction"] for batch in can_clip)
        share = sum(b["clip_fraction_eligible"] * b["eligible_fraction"] for b in can_clip) / eligible
        low, high = CLIP_BAND
        place = "below" if share < low else "above" if share > high else "within"
        band = f", {place} the usual {low:.0%} to {high:.0%}"
        lowest = min(batch["importance_ratio_min"] for batch in can_clip)
        highest = max(batch["importance_ratio_max"] for batch in can_clip)
        sentences.append(
            f"Of the tokens that can clip, {share:.2g} were clipped"
            f"{' (GRPO: .001 is usual)' if run.clips_per_token else band}; the importance ratios lay between "
            f"{lowest:.3g} and {highest:.3g}."
        )
    for alarm in {alarm.kind: alarm for alarm in run.alarms}.values():
        sentences.append(f"Warning ({alarm.kind}, {alarm.when}): {alarm.message}.")
    return sentences


def _mean(metrics: Sequence[dict]) -> float:
    return fmean(batch["reward_mean"] for batch in metrics)


def _span(metrics: Sequence[dict]) -> str:
    return batches(metrics[0]["step"], metrics[-1]["step"])
