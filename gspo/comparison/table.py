"""The figures of a comparison, as plain data for comparison.json, and as text."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from gspo.comparison.cells import Cell, decided_differently
from gspo.comparison.differences import Difference, mean_interval, paired_difference
from gspo.comparison.outcomes import Outcome
from gspo.printing import duration

Figures = Callable[[Outcome], list[float]]
# The measures that are compared. Each makes a list of a run, with one figure for every held-out problem.
FINAL, BEST, AREA, REWARD = "final pass@1", "best pass@1", "area under curve", "final mean reward"
MEASURES: dict[str, Figures] = {
    FINAL: Outcome.final,
    BEST: Outcome.best,
    AREA: Outcome.area,
    REWARD: lambda outcome: outcome.final("reward_by_problem"),
}
# Metrics of training that the table has, as means over rollout batches and seeds.
METRICS = {"clip_fraction": "clipped", "clip_fraction_eligible": "of eligible"}
# Settings of the sampler, which evaluations use as well.
SAMPLERS = ("rollout_engine", "rollout_dtype", "dtype")
WIDTH = 110


def compare(
    arms: Mapping[str, Sequence[Outcome]],
    baselines: Mapping[str, str],
    detect: float,
    failed: Mapping[Cell, str],
) -> dict:
    """Compare settings.

    Args:
        arms: label to the outcomes of its seeds.
        baselines: label to the label of the setting that it is compared with.
        detect: the size of a difference for which the number of seeds is told.
        failed: runs that did not end, and why.

    Returns:
        Plain data: "arms" (label, seeds, means with intervals), "differences", "notes".
    """
    measures = [name for name in MEASURES if name != REWARD or _rewards_differ(arms)]
    return {
        "detect": detect,
        "arms": [_summary(label, outcomes, measures) for label, outcomes in arms.items()],
        "differences": [
            _difference(name, baseline, other, arms, detect)
            for other, baseline in baselines.items()
            for name in measures
        ],
        "notes": _notes(arms, failed),
        "failed": {cell.folder.name: why for cell, why in failed.items()},
    }


def _rewards_differ(arms: Mapping[str, Sequence[Outcome]]) -> bool:
    """False if every reward is 0 or 1, so that pass@1 is its mean."""
    outcomes = [outcome for arm in arms.values() for outcome in arm]
    return any(outcome.final() != outcome.final("reward_by_problem") for outcome in outcomes)


def _summary(label: str, outcomes: Sequence[Outcome], measures: Sequence[str]) -> dict:
    seeds = []
    for outcome in outcomes:
        figures: dict[str, Any] = {"seed": outcome.cell.seed, "folder": outcome.cell.folder.name}
        figures["before"] = outcome.before()
        figures |= {name: fmean(MEASURES[name](outcome)) for name in measures}
        can_clip = bool(outcome.mean("eligible_fraction"))  # never with sapo
        figures |= {name: outcome.mean(name) if can_clip else None for name in METRICS}
        figures |= {"rollout_batches": outcome.run.step, "responses": outcome.responses}
        seeds.append(figures | {"seconds": outcome.seconds, "died": outcome.died})
    means = {}
    for name in ("before", *measures, *METRICS, "responses", "seconds"):
        values = [seed[name] for seed in seeds if seed[name] is not None]
        if values:
            mean, low, high = mean_interval(values)
            means[name] = {"mean": mean, "low": low, "high": high}
    return {"label": label, "died": sum(bool(seed["died"]) for seed in seeds), "means": means, "seeds": seeds}


def _difference(
    measure: str, first: str, other: str, arms: Mapping[str, Sequence[Outcome]], detect: float
) -> dict:
    """The difference of a measure, other - first, over the seeds that both have."""
    figures = [
        {outcome.cell.index: MEASURES[measure](outcome) for outcome in arms[label]}
        for label in (first, other)
    ]
    common = sorted(set(figures[0]) & set(figures[1]))
    found = {"measure": measure, "of": other, "to": first, "num_seeds": len(common)}
    if not common:
        return found | {"verdict": "no seed of both is there to compare"}
    if not _same_problems(arms[first], arms[other]):
        return found | {"verdict": "other held-out problems: not compared"}
    difference = paired_difference(*([each[i] for i in common] for each in figures))
    return found | {
        "mean": difference.mean, "low": difference.low, "high": difference.high,
        "num_problems": difference.num_problems, "is_seen": difference.is_seen,
        "detect": detect, "seeds_to_detect": difference.seeds_to_see(detect),
        "seeds_to_see_it_again": difference.seeds_to_see(abs(difference.mean)),
        "verdict": _verdict(difference, other, first) + _deaths(arms, (first, other)),
    }  # fmt: skip


def _same_problems(*arms: Sequence[Outcome]) -> bool:
    """True if all runs were evaluated on the same held-out problems, as far as the runs tell."""
    outcomes = [outcome for arm in arms for outcome in arm]
    digests = {outcome.held_out for outcome in outcomes} - {None}
    return len(digests) < 2 and len({len(outcome.final()) for outcome in outcomes}) < 2


def _verdict(difference: Difference, other: str, first: str) -> str:
    if difference.num_seeds == 1:
        return "one seed: nothing is said about another one"
    if not difference.is_seen:
        return "no difference seen"
    return f"{other} is ahead" if difference.mean > 0 else f"{first} is ahead"


def _deaths(arms: Mapping[str, Sequence[Outcome]], labels: Sequence[str]) -> str:
    """Say how many runs died. An alarm's rule decides that, so it may be the reason for the verdict."""
    died = {label: sum(bool(outcome.died) for outcome in arms[label]) for label in labels}
    counts = [f"{number} of {len(arms[label])} runs of {label}" for label, number in died.items() if number]
    return f" ({' and '.join(counts)} died)" if counts else ""


def _notes(arms: Mapping[str, Sequence[Outcome]], failed: Mapping[Cell, str]) -> list[str]:
    """What the reader of the table must know."""
    notes = [f"FAILED: {cell.arm}, seed {cell.seed}: {why} ({cell.log})" for cell, why in failed.items()]
    outcomes = [outcome for arm in arms.values() for outcome in arm]
    for outcome in outcomes:
        if outcome.died:
            who = f"{outcome.cell.arm}, seed {outcome.cell.seed}, after rollout batch {outcome.run.step}"
            notes.append(f"died: {who}: {outcome.died}; its last evaluation counts from there on")
    if not _same_problems(*arms.values()):
        notes.append(
            "settings were evaluated on different held-out problems and are not compared: prompts that leave "
            "no room for a response in --max_length are left out of a run"
        )
    samplers = {tuple(str(outcome.run.config.get(name)) for name in SAMPLERS) for outcome in outcomes}
    if len(samplers) > 1:
        notes.append(
            "evaluations sample as training does, and so differ between settings too "
            f"({', '.join(f'--{name}' for name in SAMPLERS)})"
        )
    notes += decided_differently([(outcome.cell.config, outcome.run.config) for outcome in outcomes])
    finished = [outcome for outcome in outcomes if not outcome.died]
    sampled = {outcome.responses for outcome in finished}
    if len(sampled) > 1:
        notes.append(
            f"unequal compute: runs have sampled from {min(sampled)} to {max(sampled)} responses each"
        )
    commits = {str(outcome.run.config.get("environment", {}).get("git_commit"))[:10] for outcome in outcomes}
    if len(commits) > 1:
        notes.append(f"the runs were made with different versions of the code: {', '.join(sorted(commits))}")
    if sum(len(arm) > 0 for arm in arms.values()) > 2:
        notes.append(
            "each interval misses the true difference once in 20 times: of many differences, some are seen "
            "by chance"
        )
    return notes


# ---- as text


def render(result: Mapping[str, Any]) -> str:
    """The tables and the notes as text."""
    lines = columns(setting_rows(result))
    if result["differences"]:
        lines += ["", "differences, paired by seed and by held-out problem, with 95 % intervals:"]
        lines += [f"  {line}" for line in columns(difference_rows(result))]
    lines += [""] if result["notes"] else []
    for note in result["notes"]:
        lines += textwrap.wrap(
            note, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def setting_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each setting under a header: means over seeds, some with 95 % intervals over them."""
    measures = [name for name in MEASURES if any(name in arm["means"] for arm in result["arms"])]
    rows = [["", "seeds", "before", *measures, *METRICS.values(), "died", "training"]]
    for arm in result["arms"]:
        means = arm["means"]
        rows.append([
            arm["label"], str(len(arm["seeds"])), with_interval(means.get("before"), spread=False),
            *(with_interval(means.get(name)) for name in measures),
            *(with_interval(means.get(name), spread=False) for name in METRICS),
            f"{arm['died']}/{len(arm['seeds'])}", duration(means["seconds"]["mean"]) if means else "-",
        ])  # fmt: skip
    return rows


def difference_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each difference under a header, with the seeds that it takes to see one of a given size."""
    rows = [["", "", "mean (95 % interval)", "verdict", f"seeds to see {result['detect']:g}"]]
    for each in result["differences"]:
        seeds = each.get("seeds_to_detect")
        unknown = each["num_seeds"] < 2 or each.get("low") == each.get("high")  # nothing has varied
        needed = "-" if unknown else str(seeds) if seeds else "more problems"
        rows.append([f"{each['of']} - {each['to']}", each["measure"], signed(each), each["verdict"], needed])
    return rows


def with_interval(figure: Mapping[str, Any] | None, spread: bool = True) -> str:
    if figure is None:
        return "-"
    mean = figure["mean"]
    if spread and figure["low"] is not None:
        return f"{mean:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{mean:.3g}" if 0 < abs(mean) < 0.01 else f"{mean:.3f}"


def signed(difference: Mapping[str, Any]) -> str:
    if "mean" not in difference:
        return "-"
    if difference["low"] is None:
        return f"{difference['mean']:+.3f}"
    return f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
