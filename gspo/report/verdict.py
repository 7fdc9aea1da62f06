"""What a run's record says about it, in a few sentences: the outcome, its evidence, what to do.

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
# A run that earns at most this share of what it earned at its start has collapsed.
REWARD_KEPT = 0.1
# The first sentence for findings about the first rollout batches; the first of them that holds.
OBSTACLES = {
    "too hard": "Tied from the start: the problems are too hard",
    "too easy": "Tied from the start: the problems are too easy",
    "tied groups": "Tied from the start",
    "cut off": "Responses are cut off before their end",
    "unjudged": "Responses could not be judged",
    "constant reward": "Every response earns the same reward",
}
LEARNED, WORSE, SAME = "It learned", "It got worse", "No difference seen"
UNKNOWN = "Not known yet whether it learns"


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    start, end = run.metrics[:WINDOW], run.metrics[-WINDOW:]
    outcome, fall = outcome_of(run), collapse(run)
    at_start = [] if fall or run.emergency else obstacles(run, start)
    evidence = [_state(run), *_what_it_learned(run)]
    if fall:
        evidence.append(_describe_collapse(run, fall))
    if run.emergency:
        evidence.append(_emergency(run))
    if fall or run.emergency:
        return [_headline(run, fall, at_start), *evidence]
    evidence += [f"In {_span(start)}, {finding.message}." for finding in at_start]
    if len(run.metrics) >= 2 * WINDOW:
        known = {finding.name for finding in at_start}
        late = [finding for finding in obstacles(run, end) if finding.name not in known]
        evidence += [f"At the end, in {_span(end)}, {finding.message}." for finding in late]
    evidence += _clipping(run)
    # The findings say why groups are tied.
    alarms = {alarm.kind: alarm for alarm in run.alarms if not (at_start and alarm.kind == "no signal")}
    evidence += [f"Warning ({alarm.kind}, {alarm.when}): {alarm.message}." for alarm in alarms.values()]
    if outcome == SAME and not at_start:
        evidence.append(
            "What changed is within chance: train longer, hold out more problems (--num_eval_samples) or, if "
            "little is clipped, raise --learning_rate."
        )
    if outcome == LEARNED and run.finished and not (at_start or alarms or one_update(run)):
        evidence.append("It can stay as it is; runs with other seeds tell how much of the gain is luck.")
    return [_headline(run, fall, at_start), *evidence]


def _headline(run: RunRecord, fall: int | None, at_start: Sequence[Finding]) -> str:
    """The outcome in a line."""
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    if fall:
        is_gibberish = text_faults(run, fall) or "gibberish" in str(run.emergency.get("reason"))
        what = "Collapsed into gibberish" if is_gibberish else "Collapsed"
        what += f": next to nothing was rewarded from rollout batch {fall} on"
        return f"{what}, {stop}." if stop else f"{what}."
    if stop:
        return f"{'Stopped' if _is_fault_of_reward(run) else 'Collapsed'}: {stop}."
    found = [finding.name for finding in at_start]
    if first := next((sentence for name, sentence in OBSTACLES.items() if name in found), None):
        return f"{first}."
    health = "with warnings" if run.alarms else "and no alarm was raised"
    if one_update(run):
        health += ", but nothing could clip: one update per rollout batch"
    return f"{outcome_of(run)}, {health}."


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
        return f"{what}Mend the reward and continue with --resume."
    rate = run.setting("learning_rate", 0)
    return (
        f"{what}The likely cause is the learning rate of {rate:g}: start anew, or from best_model, with a "
        "lower --learning_rate."
    )


# ---- what it learned


def outcome_of(run: RunRecord) -> str:
    """LEARNED, WORSE, SAME or UNKNOWN, by the paired intervals of the gains in pass@1 and in mean reward."""
    if len(run.evaluations) < 2 or len(run.evaluations[0]["pass_by_problem"]) < 2:
        return UNKNOWN
    before, after = run.evaluations[0], run.evaluations[-1]
    gains = [paired_interval(before[key], after[key]) for key in ("pass_by_problem", "reward_by_problem")]
    if any(low > 0 for _, low, _ in gains):
        return LEARNED
    return WORSE if any(high < 0 for _, _, high in gains) else SAME


def _what_it_learned(run: RunRecord) -> list[str]:
    """The held-out figures before and after."""
    if not run.evaluations:
        return ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    if before is after:
        low, high = before["interval_95"]
        what = f"Held-out pass@1 was {before['pass_at_1']:.3f} (95 % interval {low:.3f} to {high:.3f}) "
        what += f"{_when(before)}; there is no later evaluation."
        if len(run.metrics) >= 2 * WINDOW:
            first, last = _mean(run.metrics[:WINDOW]), _mean(run.metrics[-WINDOW:])
            what += f" The mean reward in training went from {first:.3f} to {last:.3f}."
        return [what]
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


def _when(evaluation: dict) -> str:
    step = evaluation["step"]
    return f"after {batches(step, step)}" if step else "before training"


# ---- obstacles to learning


def obstacles(run: RunRecord, metrics: Sequence[dict]) -> list[Finding]:
    """The findings about some rollout batches, from their metrics: the same that a run prints at its start.

    How many rewarded responses were cut is estimated from those in samples.jsonl. What needs all responses
    (the form of their answers) is left out.
    """
    if not metrics:
        return []
    size = max(1, round(run.setting("group_size", 1)))
    max_new_tokens = round(run.setting("max_new_tokens", 0)) or None

    def count(name: str) -> int:
        return round(sum(batch[name] * batch["queries"] for batch in metrics))

    queries = sum(batch["queries"] for batch in metrics)
    truncated = size * count("truncated_fraction")
    cut = [sample for sample in run.samples if sample.get("finished") is False]
    rewarded = [sample for sample in run.samples if (sample.get("reward") or 0) > 0]
    cut_share = fmean([sample.get("finished") is False for sample in rewarded] or [0])
    earned = size * queries * min(1.0, max(0.0, _mean(metrics)))  # responses with a reward, if it is 0 or 1
    at_most_new = [sample for sample in cut if sample.get("tokens") == max_new_tokens]
    rewards = {batch["reward_mean"] for batch in metrics}
    is_constant = len(rewards) == 1 and not any(batch["reward_std"] for batch in metrics)
    return findings(
        Figures(
            groups=queries,
            responses=queries * size,
            with_signal=queries - count("zero_variance_groups"),
            all_right=count("groups_all_right"),
            all_wrong=count("groups_all_wrong"),
            reward_mean=_mean(metrics),
            only_reward=rewards.pop() if is_constant else None,
            only_reward_passes=count("groups_all_right") > 0,
            unjudged=round(sum(batch["unjudged_responses"] for batch in metrics)),
            tokens_mean=fmean(batch["response_tokens_mean"] for batch in metrics),
            tokens_longest=0,
            truncated=truncated,
            truncated_rewarded=min(truncated, round(cut_share * earned)),
            truncated_by="max_new_tokens" if 2 * len(at_most_new) >= len(cut) else "max_length",
            answerable=0,
            with_answer=0,
            with_other_answer=0.0,
            has_chat_template=True,
            max_length=round(run.setting("max_length", 0)),
            max_new_tokens=max_new_tokens,
        )
    )


# ---- a collapse


def collapse(run: RunRecord) -> int | None:
    """The rollout batch from which on next to nothing was rewarded, though something was at the start.

    None if there is none. Fewer than WINDOW such batches count only if the run was stopped after them or
    earned as little in its last evaluation.
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
    first, recent = run.metrics[0], _since(run, fall)
    return [
        message.format(fmean(batch[name] for batch in recent), first[name])
        for name, message, rule in TEXT_SIGNS
        if all(rule(batch[name], first[name]) for batch in recent)
    ]


def _since(run: RunRecord, fall: int) -> list[dict]:
    return [batch for batch in run.metrics if batch["step"] >= fall][-WINDOW:]


def _describe_collapse(run: RunRecord, fall: int) -> str:
    before, after = [batch for batch in run.metrics if batch["step"] < fall][-WINDOW:], _since(run, fall)
    earned = f"from {_mean(before):.3f} in {_span(before)} " if before else ""
    what = f"The mean reward in training fell {earned}to {_mean(after):.3f} in {_span(after)}."
    if faults := text_faults(run, fall):
        what += f" The text: {'; '.join(faults)}."
    if run.emergency:  # which says what to do
        return what
    rate = run.setting("learning_rate", 0)
    return f"{what} Read samples.jsonl, and start anew with a lower --learning_rate (now {rate:g})."


# ---- clipping


def one_update(run: RunRecord) -> bool:
    """True if one update per rollout batch is made, by the settings, so that nothing can clip."""
    sampled = run.setting("batch_size", 1) * run.setting("update_frequency", 1)
    can_clip = any(batch["eligible_fraction"] for batch in run.metrics)
    made_any = any(batch["grad_norm"] for batch in run.metrics)
    return made_any and not can_clip and sampled <= run.setting("mini_batch_size", 1)


def _clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if one_update(run):
        part, whole = run.setting("mini_batch_size", 0), run.setting("batch_size", 0)
        return [
            "There was one optimizer update per rollout batch, so the importance ratio is 1 by construction "
            "and all algorithms are the same. For clipping, let --mini_batch_size "
            f"(now {part:g}) be a part of --batch_size ({whole:g})."
        ]
    can_clip = [batch for batch in run.metrics if batch["eligible_fraction"]]
    if not can_clip:
        return []
    eligible = sum(batch["eligible_fraction"] for batch in can_clip)
    share = sum(b["clip_fraction_eligible"] * b["eligible_fraction"] for b in can_clip) / eligible
    low, high = CLIP_BAND
    usual = f"within the usual {low:g} to {high:g}"
    if share < low:
        usual = f"below the usual {low:g} to {high:g}: the policy moves little"
    if share > high:
        usual = f"above the usual {low:g} to {high:g}: the policy moves far"
    if run.clips_per_token:
        usual = "about .001 is usual with GRPO"
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
