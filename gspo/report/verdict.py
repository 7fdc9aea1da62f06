"""What a run's record says about it, in a few sentences: the outcome, its evidence, what to do.

Pure functions. Limits are those of gspo.training.alarms and gspo.training.findings.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from gspo.report.run_record import EMERGENCY_STOP, RunRecord
from gspo.training.alarms import TEXT_SIGNS, WINDOW
from gspo.training.findings import MIN_GROUPS, MOST_TRUNCATED, NEARLY_ALL, NEARLY_NOTHING
from gspo.training.intervals import describe_gain, paired_interval
from gspo.training.record import FIELDS, LISTS

# Clipped tokens in a healthy run of GSPO, as a share of those that can clip.
CLIP_BAND = (0.10, 0.30)
# A run that earns at most this share of what it earned at its start has collapsed.
REWARD_KEPT = 0.1
LEARNED, WORSE, SAME = "It learned", "It got worse", "No difference seen"
UNKNOWN = "Not known yet whether it learns"
# What is measured on the held-out problems: its name, its mean, and its value for each problem.
MEASURES = (("pass@1", "pass_at_1", "pass_by_problem"), ("mean reward", "reward_mean", "reward_by_problem"))
# What keeps a run from learning: the outcome; whether the first rollout batches show it, by their means();
# and what they show, with advice. They are read in this order.
OBSTACLES: list[tuple[str, Callable[[dict], bool], str]] = [
    (
        "Responses could not be judged",
        lambda start: start["unjudged_share"] > 1 - NEARLY_ALL,
        "{unjudged_share:.0%} of the responses had no reward: repair the reward function, or leave out the "
        "problems that it cannot judge",
    ),
    (
        "Responses are cut off before their end",
        lambda start: (
            start["truncated_fraction"] >= MOST_TRUNCATED and start["reward_mean"] <= NEARLY_NOTHING
        ),
        "{truncated_fraction:.0%} of the responses were cut before their end, and next to nothing was rewarded: "
        "raise --{limit} (now {limit_now}), or ask for short answers in the prompt",
    ),
    (
        "Tied from the start: the problems are too hard",
        lambda start: start["groups_all_wrong"] >= NEARLY_ALL and start["reward_mean"] <= NEARLY_NOTHING,
        "{groups_all_wrong:.0%} of {groups} groups had no right response, and {truncated_fraction:.0%} of the "
        "responses were cut before their end: use an easier --difficulty or easier problems, a stronger model, "
        "a larger --group_size, or a reward that pays for a part of the answer; if many are cut, raise "
        "--{limit} (now {limit_now})",
    ),
    (
        "Tied from the start: the problems are too easy",
        lambda start: start["groups_all_right"] >= NEARLY_ALL,
        "{groups_all_right:.0%} of {groups} groups had only right responses: use a harder --difficulty or "
        "harder problems",
    ),
]


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    outcome, fall, start = outcome_of(run), collapse(run), means(run)
    has_failed = bool(fall or run.emergency)
    held = [(name, text) for name, holds, text in OBSTACLES if start and not has_failed and holds(start)]
    obstacle, shown = held[0] if held else ("", "")
    sentences = [state(run), *held_out(run)]
    if fall:
        sentences.append(describe_fall(run, fall))
    if obstacle:
        sentences.append(f"At the start, {shown.format_map(start)}.")
    if not has_failed:
        sentences += clipping(run)
    # The obstacle says why groups are tied.
    alarms = {alarm.kind: alarm for alarm in run.alarms if not (obstacle and alarm.kind == "no signal")}
    for kind, alarm in alarms.items():
        label = "Emergency stop" if kind == EMERGENCY_STOP else f"Warning: {kind}"
        sentences.append(f"{label}, {alarm.when}: {alarm.message}.")
    if has_failed:
        sentences.append(advice_after_failure(run))
    elif outcome == SAME and not obstacle:
        sentences.append(
            "What changed is within chance: train longer, hold out more problems (--num_eval_samples) or, if "
            "little is clipped, raise --learning_rate."
        )
    elif outcome == LEARNED and run.finished and not (obstacle or alarms or one_update(run)):
        sentences.append("It can stay as it is; runs with other seeds tell how much of the gain is luck.")
    return [headline(run, outcome, fall, obstacle), *sentences]


def headline(run: RunRecord, outcome: str, fall: int | None, obstacle: str) -> str:
    """The outcome in a line."""
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    if fall:
        what = "Collapsed into gibberish" if text_faults(run) else "Collapsed"
        end = f", {stop}" if stop else ""
        return f"{what}: next to nothing was rewarded from rollout batch {fall} on{end}."
    if stop:
        return f"{'Stopped' if nothing_judged(run) else 'Collapsed'}: {stop}."
    if obstacle and outcome != LEARNED:
        return f"{obstacle}."
    health = "with warnings" if run.alarms else "and no alarm was raised"
    if one_update(run):
        health += ", but nothing could clip: one update per rollout batch"
    return f"{outcome}, {health}."


def state(run: RunRecord) -> str:
    """How far the run has come."""
    done = f"after rollout batch {run.step}" if run.step else "before its first rollout batch was done"
    if run.finished:
        return f"The run is finished: {len(run.metrics)} rollout batches."
    if run.emergency:
        return f"The run was stopped {done}."
    if run.going:
        return f"The run is still going, {done}."
    return f"The run ended early, {done}: interrupted or killed; --resume continues it."


# ---- what it learned


def outcome_of(run: RunRecord) -> str:
    """LEARNED, WORSE, SAME or UNKNOWN, by the paired intervals of the gains in pass@1 and in mean reward."""
    if len(run.evaluations) < 2 or len(run.evaluations[0]["pass_by_problem"]) < 2:
        return UNKNOWN
    before, after = run.evaluations[0], run.evaluations[-1]
    gains = [paired_interval(before[each], after[each]) for _, _, each in MEASURES]
    if any(low > 0 for _, low, _ in gains):
        return LEARNED
    return WORSE if any(high < 0 for _, _, high in gains) else SAME


def held_out(run: RunRecord) -> list[str]:
    """The held-out figures before and after; those of the mean reward only if it is not pass@1."""
    if not run.evaluations:
        return ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    if before is after:
        low, high = before["interval_95"]
        what = f"Held-out pass@1 after rollout batch {before['step']} was {before['pass_at_1']:.3f}"
        return [f"{what} (95 % interval {low:.3f} to {high:.3f}); there is no later evaluation."]
    found: dict[str, str] = {}
    for name, mean, each in MEASURES:
        gain = describe_gain(before[each], after[each]).replace("  ", " ")
        change = f"went from {before[mean]:.3f} to {after[mean]:.3f} after rollout batch {after['step']}"
        sentence = f"{change}: gain {gain}, paired over {len(before[each])} problems."
        found.setdefault(sentence, f"Held-out {name} {sentence}")
    return list(found.values())


# ---- what went wrong


def means(run: RunRecord) -> dict[str, Any]:
    """Means over the first rollout batches, and what else OBSTACLES name; empty if they have few groups."""
    first = run.metrics[:WINDOW]
    groups = sum(batch["queries"] for batch in first)
    if groups < MIN_GROUPS:
        return {}
    names = [name for name in FIELDS["metrics"] if name not in LISTS]
    found: dict[str, Any] = {name: sum(b[name] * b["queries"] for b in first) / groups for name in names}
    unjudged = sum(batch["unjudged_responses"] for batch in first)
    is_short = any(sample.get("tokens") == run.setting("max_new_tokens") for sample in run.samples)
    limit = "max_new_tokens" if is_short else "max_length"
    return found | {
        "groups": groups,
        "unjudged_share": unjudged / (groups * max(1, run.setting("group_size"))),
        "limit": limit,
        "limit_now": run.setting(limit),
    }


def collapse(run: RunRecord) -> int | None:
    """The rollout batch from which on next to nothing was rewarded, though something was at the start.

    None if there is none. Fewer than WINDOW such batches count only if the run was stopped after them or
    earned as little in its last evaluation.
    """
    held_out = [evaluation["reward_mean"] for evaluation in run.evaluations]
    rewards = [batch["reward_mean"] for batch in run.metrics]
    start = max([fmean(rewards[:WINDOW] or [0]), *held_out[:1]])
    little = REWARD_KEPT * start
    earning = [i for i, reward in enumerate(rewards, start=1) if reward > little]
    fallen = run.metrics[max(earning, default=0) :]
    is_confirmed = len(fallen) >= WINDOW or bool(run.emergency) or any(e <= little for e in held_out[-1:])
    return fallen[0]["step"] if start > NEARLY_NOTHING and fallen and is_confirmed else None


def describe_fall(run: RunRecord, fall: int) -> str:
    before = [batch["reward_mean"] for batch in run.metrics if batch["step"] < fall]
    after = [batch["reward_mean"] for batch in run.metrics if batch["step"] >= fall]
    earlier = f"from {fmean(before):.3f} before rollout batch {fall} " if before else ""
    faults = "".join(f"; {fault}" for fault in text_faults(run))
    return f"The mean reward in training fell {earlier}to {fmean(after):.3f}{faults}."


def text_faults(run: RunRecord) -> list[str]:
    """What is worse about the text of the last rollout batch than about that of the first one."""
    first, last = run.metrics[0], run.metrics[-1]
    signs = [(name, text) for name, text, is_worse in TEXT_SIGNS if is_worse(last[name], first[name])]
    return [text.format(abs(last[name]), first[name]) for name, text in signs]


def nothing_judged(run: RunRecord) -> bool:
    return "could be judged" in str(run.emergency.get("reason"))


def advice_after_failure(run: RunRecord) -> str:
    if nothing_judged(run):
        return "Mend the reward and continue with --resume."
    rate = run.setting("learning_rate")
    return f"Start anew, or from best_model, with a lower --learning_rate (now {rate:g}); read the responses."


# ---- clipping


def one_update(run: RunRecord) -> bool:
    """True if one update is made per rollout batch, by the settings, so that nothing can clip."""
    sampled = run.setting("batch_size") * run.setting("update_frequency")
    return 0 < sampled <= run.setting("mini_batch_size")


def clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if one_update(run):
        return [
            "With one optimizer update per rollout batch the importance ratio is 1, and all algorithms are the "
            f"same. For clipping, let --mini_batch_size (now {run.setting('mini_batch_size')}) be a part of "
            f"--batch_size ({run.setting('batch_size')})."
        ]
    can_clip = [batch for batch in run.metrics if batch["eligible_fraction"]]
    if not can_clip:
        return []
    eligible = sum(batch["eligible_fraction"] for batch in can_clip)
    share = sum(batch["clip_fraction_eligible"] * batch["eligible_fraction"] for batch in can_clip) / eligible
    low, high = CLIP_BAND
    place = "below" if share < low else "above" if share > high else "within"
    usual = "" if run.clips_per_token else f" ({place} the usual {low:g} to {high:g})"
    lowest = min(batch["importance_ratio_min"] for batch in can_clip)
    highest = max(batch["importance_ratio_max"] for batch in can_clip)
    what = f"Of the tokens that can clip, {share:.2g} were clipped{usual}"
    return [f"{what}; importance ratios lay between {lowest:.3g} and {highest:.3g}."]
