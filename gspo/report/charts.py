"""The charts of report.html as data: one run with all its lines, or several overlaid, with seeds as bands.

A line is (label, colour, kind, step to value); colour is a place in the page's palette. Kinds: "line",
"points", "trend" over a "faint" one, "wide", "thin", "second" (axis on the right), "low" and "high".
"""

import json
from collections.abc import Sequence
from statistics import fmean

from gspo.report.panels import CLIPPING, LEAST_TO_SMOOTH, PANELS, REWARD, Panel, minibatches, smooth
from gspo.report.run_record import RunRecord

Line = tuple[str, int, str, dict[int, float | None]]
# Settings in which runs may differ and still differ in nothing but the seed.
BESIDE_THE_POINT = {"run_name", "output_dir", "resume", "environment", "reward_function", "problems", "data"}


def charts(runs: Sequence[RunRecord]) -> list[dict]:
    """A chart for each panel: its x, and lines with a value or None for each x."""
    groups = groups_of(runs)
    return [_chart(panel, runs, groups) for panel in PANELS]


def _chart(panel: Panel, runs: Sequence[RunRecord], groups: dict[str, list[RunRecord]]) -> dict:
    title, marks = panel.title, []
    if len(runs) == 1:
        lines = _lines_of_one(panel, runs[0])
        marks = [alarm for alarm in runs[0].alarms if alarm.kind in panel.alarms]
    else:
        lines = _lines_of_several(panel, groups)
        title += f": {next(iter(panel.lines.values()))}" if len(panel.lines) > 1 else ""
    stops = [run.emergency["step"] for run in runs if run.emergency]
    xs = sorted({step for *_, values in lines for step in values})
    return {
        "title": title,
        "band": panel.band,
        "top": panel.top,
        "x": xs,
        "lines": [
            {"label": label, "colour": colour, "kind": kind, "y": [values.get(x) for x in xs]}
            for label, colour, kind, values in lines
        ],
        "marks": [{"first": alarm.first, "last": alarm.last, "kind": alarm.kind} for alarm in marks]
        + [{"first": step, "last": step, "kind": "emergency stop"} for step in stops],
    }


def _lines_of_one(panel: Panel, run: RunRecord) -> list[Line]:
    """All lines of a panel; later ones lie over earlier ones."""
    lines: list[Line] = []
    for name, kind in zip(panel.spread, ("low", "high"), strict=False):
        lines.append((name.rpartition("_")[2], 0, kind, _values(run, name)))
    for i, (name, label) in enumerate(panel.lines.items()):
        kind = "second" if name in panel.second else "line"
        if panel.stacked and name not in panel.stacked:  # the sum of those that are, which would hide them
            kind = "wide"
        if kind == "line" and len(run.metrics) >= LEAST_TO_SMOOTH and not panel.stacked:
            lines.append((label, i, "trend", _values(run, name, smoothed=True)))
            kind = "faint"
        lines.append((label, i, kind, _values(run, name)))
    if panel is CLIPPING:
        steps = [batch["step"] for batch in run.metrics]
        for label, clipped in minibatches(run.metrics).items():
            lines.append((label, 5, "thin", dict(zip(steps, clipped, strict=True))))
    if panel is REWARD:
        for i, (label, kind) in enumerate([("95 % from", "low"), ("to", "high")]):
            lines.append((label, 1, kind, {e["step"]: e["interval_95"][i] for e in run.evaluations}))
        lines.append(("held-out pass@1", 1, "points", _passed(run)))
    return lines


def _lines_of_several(panel: Panel, groups: dict[str, list[RunRecord]]) -> list[Line]:
    """The first line of a panel for each group."""
    name = next(iter(panel.lines))
    lines = []
    for i, (label, runs) in enumerate(groups.items()):
        smoothed = all(len(run.metrics) >= LEAST_TO_SMOOTH for run in runs)
        lines += _band(label, i, "line", [_values(run, name, smoothed) for run in runs])
        if panel is REWARD:
            lines += _band(f"{label}: held-out pass@1", i, "points", [_passed(run) for run in runs])
    return lines


def _band(label: str, colour: int, kind: str, runs: Sequence[dict[int, float | None]]) -> list[Line]:
    """The mean of some runs at each step, and the lowest and the highest value if there are several runs."""
    steps = sorted({step for run in runs for step in run})
    at = {step: [value for run in runs if (value := run.get(step)) is not None] for step in steps}
    edges: list[Line] = [
        ("lowest", colour, "low", {step: min(values) for step, values in at.items()}),
        ("highest", colour, "high", {step: max(values) for step, values in at.items()}),
    ]
    mean: Line = (label, colour, kind, {step: fmean(values) for step, values in at.items()})
    return [*edges, mean] if len(runs) > 1 else [mean]


def _values(run: RunRecord, name: str, smoothed: bool = False) -> dict[int, float | None]:
    values = [batch[name] for batch in run.metrics]
    steps = [batch["step"] for batch in run.metrics]
    return dict(zip(steps, smooth(values) if smoothed else values, strict=True))


def _passed(run: RunRecord) -> dict[int, float | None]:
    return {evaluation["step"]: evaluation["pass_at_1"] for evaluation in run.evaluations}


# ---- which runs belong together


def differences(runs: Sequence[RunRecord]) -> dict[str, list]:
    """The settings in which the runs differ: name to the value of each."""
    names = {name: None for run in runs for name in run.config if name not in BESIDE_THE_POINT}
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def groups_of(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ only in their seed, together: a label to runs."""
    varied = [each for name, each in differences(runs).items() if name != "seed"]
    groups: dict[str, list[RunRecord]] = {}
    for i, run in enumerate(runs):
        settings = [run.config.get("problems"), *(each[i] for each in varied)]
        groups.setdefault(json.dumps(settings), []).append(run)
    labels = {}
    for number, same in enumerate(groups.values(), start=1):
        label = f"{same[0].name} with {len(same)} seeds" if len(same) > 1 else same[0].name
        labels[label if label not in labels else f"{label} ({number})"] = same
    return labels


def gains_by_seed(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each group of several runs, on their gains in pass@1."""
    sentences = []
    for label, same in groups_of(runs).items():
        ends = [run.evaluations for run in same if len(run.evaluations) > 1]
        gains = [evaluations[-1]["pass_at_1"] - evaluations[0]["pass_at_1"] for evaluations in ends]
        if len(gains) > 1:
            sentences.append(
                f"{label}: held-out pass@1 gained {fmean(gains):+.3f} on average, from {min(gains):+.3f} to "
                f"{max(gains):+.3f} by seed."
            )
    return sentences
