"""What a run's record says about it, in a few sentences: the outcome, its evidence, what to do.

Pure functions. Limits are those of gspo.training.alarms and gspo.training.findings.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from gspo.report.run_record import EMERGENCY_STOP, RunRecord, when
from gspo.training.alarms import TEXT_SIGNS, WINDOW
from gspo.training.findings import MIN_GROUPS, MOST_TRUNCATED, NEARLY_ALL, NEARLY_NOTHING
from gspo.training.intervals import describe_gain, paired_interval

# Clipped tokens in a healthy run of GSPO, as a share of those that can clip.
CLIP_BAND = (0.10, 0.30)
# A run that earns at most this share of what it earned at its start has collapsed.
REWARD_KEPT = 0.1
LEARNED, WORSE, SAME = "It learned", "It got worse", "No difference seen"
UNKNOWN = "Not known yet whether it learns"
MEASURES = (("pass@1", "pass_at_1", "pass_by_problem"), ("mean reward", "reward_mean", "reward_by_problem"))
# What keeps a run from learning: the outcome; whether the first rollout batches show it, by their means();
# and what they show, with advice. The first one that holds counts.
OBSTACLES: list[tuple[str, Callable[[dict], bool], str]] = [
    (
        "Responses are cut off before their end",
        lambda m: m["truncated_fraction"] >= MOST_TRUNCATED and m["reward_mean"] <= NEARLY_NOTHING,
        "{truncated_fraction:.0%} of the responses were cut before their end, and next to nothing was "
        "rewarded: raise --{limit} (now {limit_now}), or ask for short answers in the prompt",
    ),
    (
        "Tied from the start: the problems are too hard",
        lambda m: m["groups_all_wrong"] >= NEARLY_ALL and m["reward_mean"] <= NEARLY_NOTHING,
        "{groups_all_wrong:.0%} of {groups} groups had no right response: use an easier --difficulty or "
        "easier problems, a stronger model, a larger --group_size, or a reward that pays for a part of the "
        "answer ({truncated_fraction:.0%} of the responses were cut before their end, by --{limit})",
    ),
    (
        "Tied from the start: the problems are too easy",
        lambda m: m["groups_all_right"] >= NEARLY_ALL,
        "{groups_all_right:.0%} of {groups} groups had only right responses: use a harder --difficulty or "
        "harder problems",
    ),
]


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    outcome, evidence = held_out(run)
    fall, mean = collapse(run), means(run)
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    is_unjudged = "could be judged" in str(run.emergency.get("reason"))
    found = [] if fall or stop or not mean else [each for each in OBSTACLES if each[1](mean)]
    # An obstacle says why groups are tied.
    alarms = {alarm.kind: alarm for alarm in run.alarms if not (found and alarm.kind == "no signal")}
    sentences = [state(run), *evidence]
    if fall:
        first, last = run.metrics[0], run.metrics[-1]
        worse = [(name, says) for name, says, is_worse in TEXT_SIGNS if is_worse(last[name], first[name])]
        faults = [says.format(abs(last[name]), first[name]) for name, says in worse]
        headline = f"Collapsed{' into gibberish' if faults else ''}: "
        headline += f"next to nothing was rewarded from rollout batch {fall} on{', ' if stop else ''}{stop}"
        before = [batch["reward_mean"] for batch in run.metrics if batch["step"] < fall]
        after = [batch["reward_mean"] for batch in run.metrics if batch["step"] >= fall]
        earlier = f" and {fmean(before):.3f} before" if before else ""
        what = f"The mean reward in training was {fmean(after):.3f} from then on{earlier}"
        sentences.append("; ".join([what, *faults]) + ".")
    elif stop:
        headline = f"{'Stopped' if is_unjudged else 'Collapsed'}: {stop}"
    else:
        health = "with warnings" if run.alarms else "and no alarm was raised"
        health += ", but nothing could clip: one update per rollout batch" if one_update(run) else ""
        headline = found[0][0] if found and outcome != LEARNED else f"{outcome}, {health}"
        sentences += [f"In the first rollout batches, {says.format_map(mean)}." for *_, says in found[:1]]
        sentences += clipping(run)
    for kind, alarm in alarms.items():
        label = "Emergency stop" if kind == EMERGENCY_STOP else f"Warning: {kind}"
        sentences.append(f"{label}, {alarm.when}: {alarm.message}.")
    if is_unjudged:
        sentences.append("Mend the reward and continue with --resume.")
    elif fall or stop:
        rate = run.setting("learning_rate")
        sentences.append(f"Start anew, or from best_model, with a lower --learning_rate (now {rate:g}).")
    elif outcome == SAME and not found:
        sentences.append(
            "What changed is within chance: train longer, hold out more problems (--num_eval_samples) or, if "
            "little is clipped, raise --learning_rate."
        )
    elif outcome == LEARNED and run.finished and not (found or alarms or one_update(run)):
        sentences.append("It can stay as it is; runs with other seeds tell how much of the gain is luck.")
    return [f"{headline}.", *sentences]


def state(run: RunRecord) -> str:
    done = f"after rollout batch {run.step}" if run.step else "before its first rollout batch was done"
    if run.finished:
        return f"The run is finished: {len(run.metrics)} rollout batches."
    if run.emergency:
        return f"The run was stopped {done}."
    if run.going:
        return f"The run is still going, {done}."
    return f"The run ended early, {done}: interrupted or killed; --resume continues it."


def held_out(run: RunRecord) -> tuple[str, list[str]]:
    """LEARNED, WORSE, SAME or UNKNOWN, by the intervals of the gains, and sentences about these."""
    if not run.evaluations:
        return UNKNOWN, ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    count = len(before["pass_by_problem"])
    if before is after or count < 2:
        low, high = after["interval_95"]
        what = f"Held-out pass@1 was {after['pass_at_1']:.3f} (95 % interval {low:.3f} to {high:.3f})"
        return UNKNOWN, [f"{what} in the last evaluation, {when(after['step'])}."]
    gains, sentences = [], dict[str, str]()
    for name, mean, each in MEASURES:
        gains.append(paired_interval(before[each], after[each]))
        gain = describe_gain(before[each], after[each]).replace("  ", " ")
        change = f"from {before[mean]:.3f} before training to {after[mean]:.3f} after rollout batch"
        change += f" {after['step']}: gain {gain}, paired over {count} problems."
        sentences.setdefault(change, f"Held-out {name} went {change}")  # once, if the rewards are the passes
    has_risen, has_fallen = any(low > 0 for _, low, _ in gains), any(high < 0 for _, _, high in gains)
    return LEARNED if has_risen else WORSE if has_fallen else SAME, list(sentences.values())


def means(run: RunRecord) -> dict[str, Any]:
    """Means over the first rollout batches, and what else OBSTACLES name; empty if they have few groups."""
    first = run.metrics[:WINDOW]
    groups = sum(batch["queries"] for batch in first)
    if groups < MIN_GROUPS:
        return {}
    names = ("truncated_fraction", "groups_all_wrong", "groups_all_right", "reward_mean")
    found: dict[str, Any] = {name: fmean(batch[name] for batch in first) for name in names}
    is_short = any(sample.get("tokens") == run.setting("max_new_tokens") for sample in run.samples)
    limit = "max_new_tokens" if is_short else "max_length"
    return found | {"groups": groups, "limit": limit, "limit_now": run.setting(limit)}


def collapse(run: RunRecord) -> int | None:
    """The rollout batch from which on next to nothing was rewarded, though something was at the start."""
    held_out = [evaluation["reward_mean"] for evaluation in run.evaluations]
    rewards = [batch["reward_mean"] for batch in run.metrics]
    start = max([fmean(rewards[:WINDOW] or [0]), *held_out[:1]])
    little = REWARD_KEPT * start
    earning = [i for i, reward in enumerate(rewards, start=1) if reward > little]
    fallen = run.metrics[max(earning, default=0) :]
    # A few batches count only if the run was stopped after them or earned as little in its last evaluation.
    is_confirmed = len(fallen) >= WINDOW or bool(run.emergency) or any(e <= little for e in held_out[-1:])
    return fallen[0]["step"] if start > NEARLY_NOTHING and fallen and is_confirmed else None


def one_update(run: RunRecord) -> bool:
    """True if one update is made per rollout batch, by the settings, so that nothing can clip."""
    sampled = run.setting("batch_size") * run.setting("update_frequency")
    return 0 < sampled <= run.setting("mini_batch_size")


def clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if one_update(run):
        part, whole = run.setting("mini_batch_size"), run.setting("batch_size")
        advice = f"for clipping, let --mini_batch_size (now {part}) be a part of --batch_size ({whole})"
        return [f"With one optimizer update per rollout batch the importance ratio is 1; {advice}."]
    can_clip = [batch for batch in run.metrics if batch["eligible_fraction"]]
    if not can_clip:
        return []
    eligible = sum(batch["eligible_fraction"] for batch in can_clip)
    share = sum(batch["clip_fraction_eligible"] * batch["eligible_fraction"] for batch in can_clip) / eligible
    low, high = CLIP_BAND
    place = "below" if share < low else "above" if share > high else "within"
    usual = "" if run.config.get("algorithm") == "grpo" else f" ({place} the usual {low:g} to {high:g})"
    lowest = min(batch["importance_ratio_min"] for batch in can_clip)
    highest = max(batch["importance_ratio_max"] for batch in can_clip)
    what = f"Of the tokens that can clip, {share:.2g} were clipped{usual}"
    return [f"{what}; importance ratios lay between {lowest:.3g} and {highest:.3g}."]
