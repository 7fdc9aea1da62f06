"""The curves of one run, or of several with seeds as bands, as data: curves.py and page.js draw them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from gspo.report.run_record import EMERGENCY_STOP, Alarm, RunRecord
from gspo.report.verdict import CLIP_BAND
from gspo.training.find_run import FREE_ON_RESUME

# Blue, orange, green, magenta, violet and grey, for a light and for a dark background.
COLOURS = ("#3b82f6", "#f0871f", "#12a975", "#c54bb0", "#8b6cf0", "#8d97a5")
GREEN, GREY = 2, 5
# From so many rollout batches on, the mean over neighbours is drawn over the values.
LEAST_TO_SMOOTH = 30
# A line with more points is thinned: only every n-th point is drawn.
MOST_POINTS = 1000
# Settings in which runs may differ and still differ in nothing but the seed.
BESIDE_THE_POINT = {*FREE_ON_RESUME, "environment", "reward_function"} - {"num_epochs", "rollout_engine"}
Values = dict[int, float]  # step to value


class Group(NamedTuple):
    """Runs that are drawn as one line with an area around it."""

    label: str
    runs: Sequence[RunRecord]


class Panel(NamedTuple):
    title: str
    lines: dict[str, str]  # metric to label; of several runs, only the first one is drawn
    alarms: tuple[str, ...] = ()  # kinds of those that belong here
    top: float = 0.0  # what the vertical axis reaches at least, from 0 on; 0: it follows the values


REWARD = Panel("Reward", {"reward_mean": "mean reward"}, ("held-out",), top=0.1)
CLIPPING = Panel(
    "Clip fraction (green: usual)",
    {"clip_fraction_eligible": "of what can clip", "clip_fraction": "of all; grey: by minibatch"},
    ("clip", "clips most", "clips nothing", "null clip"),
    top=0.4,
)
RATIO = Panel(
    "Importance ratio",
    {"importance_ratio_mean": "mean; area: smallest to largest"},
    ("ratio", "sequence ratio", "ratio spread", "stale sampler"),
)
TIES = {"zero_variance_groups": "tied", "groups_all_wrong": "all wrong", "groups_all_right": "all right"}
SECONDS = {
    "generation_s": "sampling",
    "reward_s": "rewards",
    "log_prob_s": "log-probs",
    "update_s": "updates",
}
PANELS = (
    REWARD,
    CLIPPING,
    RATIO,
    Panel("Gradient norm", {"grad_norm": "before clipping"}, ("gradient",)),
    Panel("Response length", {"response_tokens_mean": "mean, tokens"}, ("text",)),
    Panel("Entropy", {"entropy": "nats per token"}, ("entropy",)),
    Panel(
        "Tied groups; responses cut off", TIES | {"truncated_fraction": "cut off"}, ("no signal",), top=1.0
    ),
    Panel("Seconds per rollout batch", SECONDS, top=0.1),
    Panel(  # of mixtures of experts
        "Experts that changed since pi_old", {"routing_changed": "share of the choices"}, top=0.01
    ),
    Panel(  # of runs that sample with vLLM
        "Sampler against trainer",
        {"masked_fraction": "masked", "sampler_ess": "effective sample size"},
        ("mismatch",),
        top=1.0,
    ),
)


@dataclass(frozen=True)
class Line:
    """Values over rollout batches."""

    label: str
    colour: str
    kind: str  # "line"; "points", joined by dashes; "faint"; "low" and, after it, "high", edges of an area
    x: list[int]
    y: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines, of which later ones lie over earlier ones, with marks; top as in Panel."""

    title: str
    lines: list[Line]
    marks: list[Alarm]
    top: float


def charts(runs: Sequence[RunRecord], groups: Sequence[Group] | None = None) -> list[Chart]:
    """A chart for each of PANELS.

    groups: of several runs, those that are one line; by default those that differ only in their seed.
    """
    found = []
    lines_of = [Group(_label(same), same) for same in groups_of(runs)] if groups is None else groups
    for panel in PANELS:
        kinds = (EMERGENCY_STOP, *(panel.alarms if len(runs) == 1 else ()))
        marks = [alarm for run in runs for alarm in run.alarms if alarm.kind in kinds]
        lines = _lines_of_one(panel, runs[0]) if len(runs) == 1 else _lines_of_several(panel, lines_of)
        if panel is CLIPPING:
            steps = sorted({step for line in lines for step in line.x})
            low, high = (dict.fromkeys(steps, share) for share in CLIP_BAND)
            lines = [*_area("usual", GREEN, low, high), *lines] if steps else []
        shown = f": {next(iter(panel.lines.values()))}" if len(runs) > 1 and len(panel.lines) > 1 else ""
        alarms = dict.fromkeys(f" ! {alarm.kind}" for alarm in marks if alarm.kind != EMERGENCY_STOP)
        if not any(line.x for line in lines):  # as in a run that stopped in its first rollout batch
            continue
        found.append(Chart(panel.title + shown + "".join(alarms), lines, marks, panel.top))
    return found


def _lines_of_one(panel: Panel, run: RunRecord) -> list[Line]:
    """All lines of a panel."""
    lines = []
    if panel is RATIO:
        low, high = (_values(run.metrics, f"importance_ratio_{end}") for end in ("min", "max"))
        lines += _area("ratio", 0, low, high)
    if panel is CLIPPING:
        shares = _values(run.metrics, "clip_fraction_by_minibatch")
        for i in range(1, max(map(len, shares.values()), default=0)):  # the first one cannot clip
            values = {step: share[i] for step, share in shares.items() if i < len(share)}
            lines.append(_line(f"minibatch {i + 1}", GREY, "faint", _smooth(values)))
    named = [(label, i, _values(run.metrics, name)) for i, (name, label) in enumerate(panel.lines.items())]
    if len(run.metrics) >= LEAST_TO_SMOOTH:
        lines += [_line(label, i, "faint", values) for label, i, values in named]
    lines += [_line(label, i, "line", _smooth(values)) for label, i, values in named]
    if panel is REWARD:
        intervals = _values(run.evaluations, "interval_95")
        low, high = ({step: interval[i] for step, interval in intervals.items()} for i in (0, 1))
        lines += _area("95 % interval", 1, low, high)
        lines.append(_line("held-out pass@1, 95 %", 1, "points", _values(run.evaluations, "pass_at_1")))
    return lines


def _label(same: Sequence[RunRecord]) -> str:
    return same[0].name if len(same) == 1 else f"{same[0].name} with {len(same)} seeds"


def _lines_of_several(panel: Panel, groups: Sequence[Group]) -> list[Line]:
    """The first line of a panel for each group of runs: the mean, from the lowest to the highest."""
    lines = []
    name = next(iter(panel.lines))
    for i, (label, same) in enumerate(groups):
        drawn = [(label, "line", [_smooth(_values(run.metrics, name)) for run in same])]
        if panel is REWARD:
            passed = [_values(run.evaluations, "pass_at_1") for run in same]
            drawn.append((f"{label}: held-out pass@1", "points", passed))
        for label, kind, seeds in drawn:
            # Only steps that all seeds have: where one seed ends, the mean of the others would jump.
            steps = sorted(set[int]().union(*seeds).intersection(*seeds))
            at = {step: [values[step] for values in seeds] for step in steps}
            low, mean, high = ({step: f(values) for step, values in at.items()} for f in (min, fmean, max))
            lines += _area(label, i, low, high) if len(same) > 1 else []
            lines.append(_line(label, i, kind, mean))
    return lines


def _area(label: str, colour: int, low: Values, high: Values) -> list[Line]:
    return [_line(f"{label}, low", colour, "low", low), _line(f"{label}, high", colour, "high", high)]


def _line(label: str, colour: int, kind: str, values: Values) -> Line:
    stride = max(1, len(values) // MOST_POINTS)
    rounded = [float(f"{round(value, 9):.5g}") for value in values.values()]
    return Line(label, COLOURS[colour % len(COLOURS)], kind, list(values)[::stride], rounded[::stride])


def _values(lines: Sequence[dict], name: str) -> dict:
    return {line["step"]: line[name] for line in lines if name in line}


def _smooth(values: Values) -> Values:
    """The mean of each value and its neighbours, a twentieth of all on either side; of few, the values."""
    count = len(values)
    reach = count // 20 if count >= LEAST_TO_SMOOTH else 0
    sums = [0.0, *accumulate(values.values())]  # of the values before each
    smoothed = {}
    for i, step in enumerate(values):
        first, last = max(0, i - reach), min(count, i + reach + 1)
        smoothed[step] = (sums[last] - sums[first]) / (last - first)
    return smoothed


def differences(runs: Sequence[RunRecord]) -> dict[str, list]:
    """The settings in which the runs differ: name to the value of each."""
    names = {name: None for run in runs for name in run.config if name not in BESIDE_THE_POINT}
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def groups_of(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ only in their seed, together."""
    varied = [each for name, each in differences(runs).items() if name != "seed"]
    groups: dict[str, list[RunRecord]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(json.dumps([each[i] for each in varied]), []).append(run)
    return list(groups.values())
