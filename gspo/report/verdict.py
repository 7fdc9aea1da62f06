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
# The first sentence for each finding about the first rollout batches.
OBSTACLES = {
    "too hard": "Tied from the start: the problems are too hard",
    "too easy": "Tied from the start: the problems are too easy",
    "tied groups": "Tied from the start",
    "cut off": "Responses are cut off before their end",
    "unjudged": "Responses could not be judged",
    "constant reward": "Every response earns the same reward",
}


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    fall = collapse(run)
    start = run.metrics[:WINDOW]
    at_start = [] if fall or run.emergency else obstacles(run, start)
    sentences = [_headline(run, fall, at_start), _state(run), *_what_it_learned(run)]
    if _outcome(run) == SAME and not fall and not at_start:
        sentences.append(
            "That is within chance: train longer, or hold out more problems (--num_eval_samples) to see more."
        )
    if fall:
        sentences.append(_describe_collapse(run, fall))
    if run.emergency:
        return [*sentences, _emergency(run)]
    sentences += [f"In {_span(start)}, {finding.message}." for finding in at_start]
    if len(run.metrics) >= 2 * WINDOW and not fall:
        known = {finding.name for finding in at_start}
        end = run.metrics[-WINDOW:]
        late = [finding for finding in obstacles(run, end) if finding.name not in known]
        sentences += [f"At the end, in {_span(end)}, {finding.message}." for finding in late]
    sentences += _clipping(run)
    alarms = {alarm.kind: alarm for alarm in run.alarms}
    if at_start:  # which says why groups are tied
        alarms.pop("no signal", None)
    for alarm in alarms.values():
        sentences.append(f"Warning ({alarm.kind}, {alarm.when}): {alarm.message}.")
    if not at_start and not run.alarms and _outcome(run) == LEARNED:
        sentences.append("Nothing needs changing; runs with other seeds tell how much of the gain is luck.")
    return sentences


LEARNED, WORSE, SAME, UNKNOWN = "It learned", "It got worse", "No difference seen", "Not known yet"


def _outcome(run: RunRecord) -> str:
    """What the paired interval of the gain says, of the two gains the clearer one."""
    gains = _gains(run)
    if not gains:
        return UNKNOWN
    if any(low > 0 for _, low, _ in gains):
        return LEARNED
    return WORSE if any(high < 0 for _, _, high in gains) else SAME


def _headline(run: RunRecord, fall: int | None, at_start: Sequence[Finding]) -> str:
    """The outcome in a line."""
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    if fall:
        is_gibberish = text_faults(run, fall) or "gibberish" in str(run.emergency.get("reason"))
        what = "Collapsed into gibberish" if is_gibberish else "Collapsed"
        tail = f", {stop}" if stop else ""
        return f"{what}: next to nothing was rewarded from rollout batch {fall} on{tail}."
    if stop:
        return f"{'Stopped' if _is_fault_of_reward(run) else 'Collapsed'}: {stop}."
    for finding in at_start:
        return f"{OBSTACLES.get(finding.name, finding.name.capitalize())}."
    if run.alarms:
        health = "with warnings"
    elif _one_update(run):
        health = "though nothing could clip"
    else:
        health = "no alarm was raised"
    return f"{_outcome(run)}, {health}."


# ---- the state of the run


def _state(run: RunRecord) -> str:
    drawn = sum(batch["queries"] for batch in run.metrics)
    done = f"after {batches(run.step, run.step)}" if run.step else "before its first rollout batch was done"
    if run.finished:
        return f"The run is finished: {len(run.metrics)} rollout batches, {drawn} queries."
    if run.emergency:
        return f"The run was stopped {done}."
    if run.going:
        return f"The run is still going, {done}."
    return f"The run ended early, {done} ({drawn} queries): interrupted or killed; --resume continues it."


def _is_fault_of_reward(run: RunRecord) -> bool:
    return "judged" in str(run.emergency["reason"]) or "reward function" in str(run.emergency["reason"])


def _emergency(run: RunRecord) -> str:
    """Why the run stopped, and what to do."""
    what = f"Emergency stop in rollout batch {run.emergency['step']}, before its update: "
    what += f"{run.emergency['reason']}. The evidence is in emergency/. "
    if _is_fault_of_reward(run):
        return what + "Mend the reward and continue with --resume."
    return what + (
        f"The likely cause is the learning rate of {run.setting('learning_rate', 0):g}: start anew, or from "
        "best_model, with a lower --learning_rate."
    )


# ---- what it learned


def _gains(run: RunRecord) -> list[tuple[float, float, float]]:
    """Gain in pass@1 and in mean reward by the last evaluation, paired by problem: (mean, low, high) each."""
    if len(run.evaluations) < 2 or len(run.evaluations[0]["pass_by_problem"]) < 2:
        return []
    before, after = run.evaluations[0], run.evaluations[-1]
    return [paired_interval(before[key], after[key]) for key in ("pass_by_problem", "reward_by_problem")]


def _what_it_learned(run: RunRecord) -> list[str]:
    if not run.evaluations:
        return ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    if before is after:
        low, high = before["interval_95"]
        return [
            f"Held-out pass@1 was {before['pass_at_1']:.3f} (95 % interval {low:.3f} to {high:.3f}) "
            f"{_when(before)}; there is no later evaluation{_reward_in_training(run)}."
        ]
    names = {"pass@1": ("pass_at_1", "pass_by_problem"), "mean reward": ("reward_mean", "reward_by_problem")}
    if all(e["pass_by_problem"] == e["reward_by_problem"] for e in (before, after)):
        del names["mean reward"]
    sentences = []
    for name, (mean, by_problem) in names.items():
        gain = describe_gain(before[by_problem], after[by_problem]).replace("  ", " ")
        sentences.append(
            f"Held-out {name} went from {before[mean]:.3f} {_when(before)} to {after[mean]:.3f} "
            f"{_when(after)}: gain {gain}, paired over {len(before[by_problem])} problems."
        )
    return sentences


def _reward_in_training(run: RunRecord) -> str:
    if len(run.metrics) < 2 * WINDOW:
        return ""
    first, last = run.metrics[:WINDOW], run.metrics[-WINDOW:]
    return f"; the mean reward in training went from {_mean(first):.3f} to {_mean(last):.3f}"


def _when(evaluation: dict) -> str:
    return (
        f"after {batches(evaluation['step'], evaluation['step'])}"
        if evaluation["step"]
        else "before training"
    )


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
    """The rollout batch from which on next to nothing was rewarded, though something was at the start.

    None if there is none. Fewer than WINDOW such batches count only if the run was stopped after them or
    earned as little in an evaluation.
    """
    if not run.metrics:
        return None
    held_out = [evaluation["reward_mean"] for evaluation in run.evaluations]
    start = max([_mean(run.metrics[:WINDOW]), *held_out[:1]])
    little = REWARD_KEPT * start
    first = len(run.metrics)
    while first and run.metrics[first - 1]["reward_mean"] <= little:
        first -= 1
    fallen = run.metrics[first:]
    is_confirmed = len(fallen) >= WINDOW or bool(run.emergency) or any(e <= little for e in held_out[-1:])
    return fallen[0]["step"] if start > NEARLY_NOTHING and fallen and is_confirmed else None


def text_faults(run: RunRecord, fall: int) -> list[str]:
    """What is worse about the text of the last rollout batches than about that of the first one."""
    first, recent = run.metrics[0], _fallen(run, fall)
    return [
        message.format(fmean(batch[name] for batch in recent), first[name])
        for name, message, rule in TEXT_SIGNS
        if all(rule(batch[name], first[name]) for batch in recent)
    ]


def _fallen(run: RunRecord, fall: int) -> list[dict]:
    return [batch for batch in run.metrics if batch["step"] >= fall][-WINDOW:]


def _describe_collapse(run: RunRecord, fall: int) -> str:
    before, after = [b for b in run.metrics if b["step"] < fall][-WINDOW:], _fallen(run, fall)
    earned = f"from {_mean(before):.3f} in {_span(before)} " if before else ""
    what = f"The mean reward in training fell {earned}to {_mean(after):.3f} in {_span(after)}."
    if faults := text_faults(run, fall):
        what += f" The text: {'; '.join(faults)}."
    if run.emergency:
        return what
    rate = run.setting("learning_rate", 0)
    return f"{what} Read samples.jsonl, and start anew with a lower --learning_rate (now {rate:g})."


def _one_update(run: RunRecord) -> bool:
    """True if pi_old was refreshed after every update, so that nothing could clip."""
    updated = [batch for batch in run.metrics if batch["grad_norm"]]
    return bool(updated) and not any(batch["eligible_fraction"] for batch in updated)


def _clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if _one_update(run):
        return [
            "Nothing could clip: there was one optimizer update per rollout batch, so the importance ratio "
            "is 1 by construction and all algorithms are the same. For clipping, let --mini_batch_size (now "
            f"{run.setting('mini_batch_size', 0):g}) be a part of --batch_size "
            f"({run.setting('batch_size', 0):g})."
        ]
    can_clip = [batch for batch in run.metrics if batch["eligible_fraction"]]
    if not can_clip:
        return []
    eligible = sum(batch["eligible_fraction"] for batch in can_clip)
    share = sum(b["clip_fraction_eligible"] * b["eligible_fraction"] for b in can_clip) / eligible
    low, high = CLIP_BAND
    place = "below" if share < low else "above" if share > high else "within"
    usual = (
        "about .001 is usual with GRPO" if run.clips_per_token else f"{place} the usual {low:g} to {high:g}"
    )
    lowest = min(batch["importance_ratio_min"] for batch in can_clip)
    highest = max(batch["importance_ratio_max"] for batch in can_clip)
    return [
        f"Of the tokens that can clip, {share:.2g} were clipped ({usual}); importance ratios lay between "
        f"{lowest:.3g} and {highest:.3g}."
    ]


def _mean(metrics: Sequence[dict]) -> float:
    return fmean(batch["reward_mean"] for batch in metrics)


def _span(metrics: Sequence[dict]) -> str:
    return batches(metrics[0]["step"], metrics[-1]["step"])
