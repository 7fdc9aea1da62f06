"""What a run's record says about it, in a few sentences: the outcome, its evidence, what to do.

Pure functions. Limits are those of gspo.training.alarms and gspo.training.findings.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from gspo.report.run_record import EMERGENCY_STOP, Alarm, RunRecord, when
from gspo.training.alarms import TEXT_SIGNS, WINDOW
from gspo.training.findings import MIN_GROUPS, MOST_TRUNCATED, NEARLY_ALL, NEARLY_NOTHING
from gspo.training.intervals import describe_gain, paired_interval

# Clipped tokens in a healthy run of GSPO, as a share of those that can clip.
CLIP_BAND = (0.10, 0.40)
# A run that earns at most this share of what it earned at its start has collapsed.
REWARD_KEPT = 0.1
LEARNED, WORSE, SAME = "It learned", "It got worse", "No clear difference"
MIXED = "Mean reward and pass@1 went opposite ways"
UNKNOWN = "Not known yet whether it learns"
# Emergency stops for which the weights are to blame, by words of their reasons.
FAULTS_OF_WEIGHTS = ("importance_ratio", "gibberish", "weight tensors", "grad_norm")
TIES = ("groups_all_wrong", "groups_all_right", "zero_variance_groups")
MEASURES = (("pass@1", "pass_at_1", "pass_by_problem"), ("mean reward", "reward_mean", "reward_by_problem"))
# What keeps a run from learning: the outcome; whether the first rollout batches show it, by their means();
# and what they show, with advice. The first one that holds counts.
OBSTACLES: list[tuple[str, Callable[[dict], bool], str]] = [
    (
        "Responses are cut off before their end",
        lambda m: m["truncated_fraction"] >= MOST_TRUNCATED and m["reward_mean"] <= NEARLY_NOTHING,
        "{truncated_fraction:.0%} of the responses were cut before their end, and next to nothing was "
        "rewarded: raise --{limit}{now}, or ask for shorter answers in the prompt",
    ),
    (
        "Every group is tied: the problems are too hard",
        lambda m: min(m["groups_all_wrong"], m["zero_variance_groups"]) >= NEARLY_ALL,
        "{groups_all_wrong:.0%} of {groups} groups had no right response: use an easier --difficulty or "
        "easier problems, a stronger model, a larger --group_size, or a reward for partly right answers "
        "({truncated_fraction:.0%} of the responses were cut before their end, by --{limit})",
    ),
    (
        "Every group is tied: the problems are too easy",
        lambda m: min(m["groups_all_right"], m["zero_variance_groups"]) >= NEARLY_ALL,
        "{groups_all_right:.0%} of {groups} groups had only right responses: use a harder --difficulty or "
        "harder problems",
    ),
]


def verdict(run: RunRecord) -> list[str]:
    """Sentences about a run, the outcome first, what to do last."""
    outcome, evidence = held_out(run)
    fall, found = collapse(run), obstacle(run)
    stop = f"emergency stop in rollout batch {run.emergency['step']}" if run.emergency else ""
    reason = str(run.emergency.get("reason", ""))
    is_of_weights = any(word in reason for word in FAULTS_OF_WEIGHTS)
    alarms = {alarm.kind: alarm for alarm in told_alarms(run)}
    sentences = [state(run), *evidence]
    if fall:
        faults = text_faults(run)
        headline = f"Collapsed{' into gibberish' if faults else ''}: "
        headline += f"next to nothing was rewarded from rollout batch {fall} on{', ' if stop else ''}{stop}"
        sentences.append("; ".join([rewards_around(run, fall), *faults]) + ".")
    elif stop:
        headline = f"{'Collapsed' if is_of_weights else 'Stopped'}: {stop}"
    else:
        health = "with warnings" if run.alarms else "and no alarm was raised"
        health += ", but nothing could clip: one update per rollout batch" if one_update(run) else ""
        headline = found[0] if found else f"{outcome}, {health}"
        sentences += [f"In the first rollout batches, {found[1]}."] if found else []
        if run.metrics and not any(batch["grad_norm"] for batch in run.metrics):
            sentences.append("No update was made, so the weights are as they were.")
        sentences += clipping(run)
    for kind, alarm in alarms.items():
        label = "Emergency stop" if kind == EMERGENCY_STOP else f"Warning: {kind}"
        sentences.append(f"{label}, {alarm.when}: {alarm.message}.")
    if fall or is_of_weights:
        rate = f"a lower --learning_rate{run.now('learning_rate')}"
        sentences.append(f"Start anew, or from best_model if there is one, with {rate}.")
    elif stop:
        is_of_reward = "could be judged" in reason or "reward" in reason
        what = "Mend the reward" if is_of_reward else "Look into emergency/"
        sentences.append(f"{what}, and continue with --resume.")
    elif outcome == MIXED:
        sentences.append(
            "Read the held-out responses: the reward may pay for something else than right answers."
        )
    elif outcome == SAME and run.finished and not found:
        sentences.append(
            "The gain may be chance: train longer, hold out more problems (--num_eval_samples), or raise "
            "--learning_rate if little is clipped."
        )
    elif outcome == LEARNED and run.finished and not (found or alarms or one_update(run)):
        sentences.append(
            "Nothing needs to change. Other seeds (--seed) tell how far the gain depends on luck."
        )
    return [f"{headline}.", *sentences]


def obstacle(run: RunRecord) -> tuple[str, str] | None:
    """The first of OBSTACLES that held at the start and still holds, as outcome and evidence.

    None is looked for where a run has learned, got worse or collapsed.
    """
    if run.emergency or collapse(run) or held_out(run)[0] not in (SAME, UNKNOWN):
        return None
    start, end = means(run, run.metrics[:WINDOW]), means(run, run.metrics[-WINDOW:])
    for outcome, holds, says in OBSTACLES:
        if start and holds(start) and holds(end):
            return outcome, says.format_map(start)
    return None


def told_alarms(run: RunRecord) -> list[Alarm]:
    """Return the alarms to show: all but "no signal" where an obstacle already says why groups are tied."""
    left_out = "no signal" if obstacle(run) else None
    return [alarm for alarm in run.alarms if alarm.kind != left_out]


def text_faults(run: RunRecord) -> list[str]:
    """Return what is worse about the text of the last rollout batch than about that of the first."""
    first, last = run.metrics[0], run.metrics[-1]
    worse = [(name, says) for name, says, is_worse in TEXT_SIGNS if is_worse(last[name], first[name])]
    return [says.format(abs(last[name]), first[name]) for name, says in worse]


def rewards_around(run: RunRecord, fall: int) -> str:
    """Return the mean rewards before and after a collapse in words."""
    before = [batch["reward_mean"] for batch in run.metrics if batch["step"] < fall]
    after = [batch["reward_mean"] for batch in run.metrics if batch["step"] >= fall]
    what = f"The mean reward in training was {fmean(after):.3f} from then on"
    if not before:
        return what
    cause = f"it is the updates of rollout batch {fall - 1} that came before"
    return f"{what} and {fmean(before):.3f} before; {cause}"


def state(run: RunRecord) -> str:
    """Return how far the run has come, in words."""
    done = f"after rollout batch {run.step}" if run.step else "before its first rollout batch was done"
    if run.damage:
        return f"The record is damaged, and what came {done} may be missing here."
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
        again = (
            "was not evaluated again" if before is after else "one held-out problem tells nothing of a gain"
        )
        return UNKNOWN, [f"{what} {when(after['step'])}; it {again}."]
    gains, sentences = [], dict[str, str]()
    for name, mean, each in MEASURES:
        gains.append(paired_interval(before[each], after[each]))
        gain = describe_gain(before[each], after[each]).replace("  ", " ")
        change = f"from {before[mean]:.3f} before training to {after[mean]:.3f} after rollout batch"
        change += f" {after['step']}: gain {gain}, paired over {count} problems."
        sentences.setdefault(change, f"Held-out {name} went {change}")  # once, if the rewards are the passes
    # Without an interval, where low is high, a gain is no evidence.
    has_risen = any(0 < low < high for _, low, high in gains)
    has_fallen = any(low < high < 0 for _, low, high in gains)
    outcome = {(True, False): LEARNED, (False, True): WORSE, (True, True): MIXED}.get(
        (has_risen, has_fallen), SAME
    )
    return outcome, list(sentences.values())


def means(run: RunRecord, metrics: Sequence[dict]) -> dict[str, Any]:
    """Means over some rollout batches, and what else OBSTACLES name; empty if they have few groups."""
    groups = sum(batch["queries"] for batch in metrics)
    if groups < MIN_GROUPS:
        return {}
    names = ("truncated_fraction", *TIES, "reward_mean")
    found: dict[str, Any] = {name: fmean(batch[name] for batch in metrics) for name in names}
    is_short = any(sample.get("tokens") == run.setting("max_new_tokens") for sample in run.samples)
    limit = "max_new_tokens" if is_short else "max_length"
    what = "" if is_short else ", the tokens of prompt and response together"
    return found | {"groups": groups, "limit": limit, "now": run.now(limit) + what}


def collapse(run: RunRecord) -> int | None:
    """The rollout batch from which on next to nothing was rewarded, though something was at the start.

    Batches of which nothing was judged do not count.
    """
    responses = max(1, run.setting("group_size"))
    judged = [b for b in run.metrics if b["unjudged_responses"] < responses * b["queries"]]
    rewards = [batch["reward_mean"] for batch in judged]
    start = fmean(rewards[:WINDOW] or [0])
    earning = [i for i, reward in enumerate(rewards, start=1) if reward > REWARD_KEPT * start]
    fallen = judged[max(earning, default=0) :]
    if start <= NEARLY_NOTHING or not fallen:
        return None
    # An evaluation since then decides. Without one, an emergency stop does, or so many batches that they are
    # twice as many as ever earned nothing in a row before.
    stretches = [later - i for i, later in pairwise([0, *earning])]
    since = [e["reward_mean"] for e in run.evaluations if e["step"] >= fallen[0]["step"]]
    if since:
        is_confirmed = since[-1] <= REWARD_KEPT * run.evaluations[0]["reward_mean"]
    else:
        is_confirmed = bool(run.emergency) or len(fallen) >= max(WINDOW, 2 * max(stretches, default=0))
    return fallen[0]["step"] if is_confirmed else None


def one_update(run: RunRecord) -> bool:
    """True if one update is made per rollout batch, by the settings, so that nothing can clip."""
    if run.config.get("pi_old") == "sampler":  # whose rounding alone may leave the clip range
        return False
    sampled = run.setting("batch_size") * run.setting("update_frequency")
    return 0 < sampled <= run.setting("mini_batch_size")


def clipping(run: RunRecord) -> list[str]:
    """How much was clipped, and how far the ratios went."""
    if one_update(run):
        part, whole = run.setting("mini_batch_size"), run.setting("batch_size")
        advice = f"Clipping takes a --mini_batch_size (now {part}) below --batch_size ({whole})"
        return [f"With one optimizer update per rollout batch the importance ratio is 1. {advice}."]
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
