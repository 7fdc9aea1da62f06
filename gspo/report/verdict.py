"""What a run's record says about it, in a few sentences: the outcome, its evidence, what to do.

Pure functions. Limits are those of gspo.training.alarms and gspo.training.findings.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from gspo.report.run_record import EMERGENCY_STOP, RunRecord, batches
from gspo.training.alarms import TEXT_SIGNS, WINDOW
from gspo.training.findings import MIN_GROUPS, MOST_TRUNCATED, NEARLY_ALL, NEARLY_NOTHING, TRUNCATED_SHARE
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

Means = dict[str, float]


def is_tied(start: Means) -> bool:
    return start["groups"] >= MIN_GROUPS and start["zero_variance_groups"] >= NEARLY_ALL


def has_no_right_response(start: Means) -> bool:
    is_cut = start["truncated_fraction"] >= MOST_TRUNCATED  # too few ended to tell
    nothing_earned = start["groups_all_wrong"] >= NEARLY_ALL and start["reward_mean"] <= NEARLY_NOTHING
    return is_tied(start) and nothing_earned and not is_cut


# What keeps a run from learning: the first sentence about it, whether the first rollout batches show it, and
# what they show, with advice. The first one that holds is the run's outcome.
OBSTACLES: list[tuple[str, Callable[[Means], bool], str]] = [
    (
        "Responses could not be judged",
        lambda start: start["unjudged_share"] > 1 - NEARLY_ALL,
        "{unjudged_share:.0%} of the responses have no reward: repair the reward function, or leave out the "
        "problems that it cannot judge",
    ),
    (
        "Tied from the start: the problems are too hard",
        has_no_right_response,
        "{groups_all_wrong:.0%} of {groups} groups had no right response: use an easier --difficulty or easier "
        "problems, a stronger model, a larger --group_size, or a reward that pays for a part of the answer",
    ),
    (
        "Tied from the start: the problems are too easy",
        lambda start: is_tied(start) and start["groups_all_right"] >= NEARLY_ALL,
        "{groups_all_right:.0%} of {groups} groups had only right responses: use a harder --difficulty or "
        "harder problems",
    ),
    (
        "Responses are cut off before their end",
        lambda start: start["truncated_fraction"] >= TRUNCATED_SHARE,
        "{truncated_fraction:.0%} of the responses were cut before their end: raise --max_new_tokens (now "
        "{max_new_tokens:g}) or --max_length (now {max_length:g}), or ask for short answers in the prompt",
    ),
    (
        "Tied from the start: the responses to a problem earn the same",
        lambda start: is_tied(start) and max(start["groups_all_right"], start["groups_all_wrong"]) < NEARLY_ALL,
        "{zero_variance_groups:.0%} of {groups} groups were tied, though not all were right and not all were "
        "wrong: look at the reward function, or raise --temperature or --group_size",
    ),
]


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    outcome, fall = outcome_of(run), collapse(run)
    has_failed = bool(fall or run.emergency)
    start = means(run)
    found = [(title, text) for title, holds, text in OBSTACLES if start and not has_failed and holds(start)]
    span = batches(1, min(WINDOW, run.step))
    alarms = {alarm.kind: alarm for alarm in run.alarms if not (found and alarm.kind == "no signal")}
    sentences = [state(run), *held_out(run), *describe_fall(run, fall)]
    sentences += [f"In {span}, {text.format_map(start)}." for _, text in found]
    sentences += [] if has_failed else clipping(run)
    for alarm in alarms.values():
        name = "Emergency stop" if alarm.kind == EMERGENCY_STOP else f"Warning: {alarm.kind}"
        sentences.append(f"{name}, {alarm.when}: {alarm.message}.")
    if has_failed:
        sentences.append(advice_after_failure(run))
    elif outcome == SAME and not found:
        sentences.append(
            "What changed is within chance: train longer, hold out more problems (--num_eval_samples) or, if "
            "little is clipped, raise --learning_rate."
        )
    elif outcome == LEARNED and run.finished and not (found or alarms or one_update(run)):
        sentences.append("It can stay as it is; runs with other seeds tell how much of the gain is luck.")
    return [headline(run, outcome, fall, [title for title, _ in found]), *sentences]


def headline(run: RunRecord, outcome: str, fall: int | None, obstacles: Sequence[str]) -> str:
    """The outcome in a line."""
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    if fall:
        what = "Collapsed into gibberish" if text_faults(run) else "Collapsed"
        end = f", {stop}" if stop else ""
        return f"{what}: next to nothing was rewarded from rollout batch {fall} on{end}."
    if stop:
        return f"{'Stopped' if nothing_judged(run) else 'Collapsed'}: {stop}."
    if obstacles and outcome != LEARNED:
        return f"{obstacles[0]}."
    health = "with warnings" if run.alarms else "and no alarm was raised"
    if one_update(run):
        health += ", but nothing could clip: one update per rollout batch"
    return f"{outcome}, {health}."


def state(run: RunRecord) -> str:
    """How far the run has come."""
    done = f"after {batches(run.step, run.step)}" if run.step else "before its first rollout batch was done"
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
    """The held-out figures before and after."""
    if not run.evaluations:
        return ["The held-out problems have not been evaluated."]
    before, after = run.evaluations[0], run.evaluations[-1]
    if before is after:
        low, high = before["interval_95"]
        interval = f"95 % interval {low:.3f} to {high:.3f}"
        return [f"Held-out pass@1 was {before['pass_at_1']:.3f} ({interval}) {_when(before)}; no later evaluation."]
    sentences = []
    for name, mean, each in MEASURES:
        gain = describe_gain(before[each], after[each]).replace("  ", " ")
        sentences.append(
            f"Held-out {name} went from {before[mean]:.3f} {_when(before)} to {after[mean]:.3f} "
            f"{_when(after)}: gain {gain}, paired over {len(before[each])} problems."
        )
    is_same = all(e["pass_by_problem"] == e["reward_by_problem"] for e in (before, after))
    return sentences[:1] if is_same else sentences


def _when(evaluation: dict) -> str:
    step = evaluation["step"]
    return f"after {batches(step, step)}" if step else "before training"


# ---- what went wrong


def means(run: RunRecord) -> Means:
    """The mean of each figure over the first rollout batches, with the settings that advice names."""
    first = run.metrics[:WINDOW]
    groups = sum(batch["queries"] for batch in first)
    if not groups:
        return {}
    names = [name for name in FIELDS["metrics"] if name not in LISTS]
    found = {name: sum(batch[name] * batch["queries"] for batch in first) / groups for name in names}
    responses = groups * run.setting("group_size", 1)
    unjudged = sum(batch["unjudged_responses"] for batch in first)
    settings = {name: run.setting(name, 0) for name in ("max_length", "max_new_tokens")}
    return found | settings | {"groups": groups, "unjudged_share": unjudged / responses}


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


def text_faults(run: RunRecord) -> list[str]:
    """What is worse about the text of the last rollout batch than about that of the first one."""
    first, last = run.metrics[0], run.metrics[-1]
    signs = [(name, text) for name, text, is_worse in TEXT_SIGNS if is_worse(last[name], first[name])]
    return [text.format(last[name], first[name]) for name, text in signs]


def describe_fall(run: RunRecord, fall: int | None) -> list[str]:
    if not fall:
        return []
    before = [batch["reward_mean"] for batch in run.metrics if batch["step"] < fall]
    after = [batch["reward_mean"] for batch in run.metrics if batch["step"] >= fall]
    earlier = f"from {fmean(before):.3f} before rollout batch {fall} " if before else ""
    faults = "; ".join(["", *text_faults(run)])
    return [f"The mean reward in training fell {earlier}to {fmean(after):.3f} since{faults}."]


def nothing_judged(run: RunRecord) -> bool:
    return "could be judged" in str(run.emergency.get("reason"))


def advice_after_failure(run: RunRecord) -> str:
    if nothing_judged(run):
        return "Mend the reward and continue with --resume."
    rate = run.setting("learning_rate", 0)
    return f"Start anew, or from best_model, with a lower --learning_rate (now {rate:g}); read samples.jsonl."


def one_update(run: RunRecord) -> bool:
    """True if one update is made per rollout batch, by the settings, so that nothing can clip."""
    sampled = run.setting("batch_size", 1) * run.setting("update_frequency", 1)
    return sampled <= run.setting("mini_batch_size", 0)


def clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if one_update(run):
        return [
            "With one optimizer update per rollout batch the importance ratio is 1, and all algorithms are the "
            f"same. For clipping, let --mini_batch_size (now {run.setting('mini_batch_size', 0):g}) be a part "
            f"of --batch_size ({run.setting('batch_size', 0):g})."
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
    return [
        f"Of the tokens that can clip, {share:.2g} were clipped{usual}; importance ratios lay between "
        f"{lowest:.3g} and {highest:.3g}."
    ]
