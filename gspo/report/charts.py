"""The curves of one run, or of several with seeds as bands, as data: curves.py and page.js draw them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gspo.report.run_record import EMERGENCY_STOP, Alarm, RunRecord
from gspo.report.verdict import CLIP_BAND

# Blue, orange, green, magenta, violet and grey, for a light and for a dark background.
COLOURS = ("#3b82f6", "#f0871f", "#12a975", "#c54bb0", "#8b6cf0", "#8d97a5")
GREY = 5
MOST_MINIBATCHES = 8
# From so many rollout batches on, the mean over neighbours is drawn over the values.
LEAST_TO_SMOOTH = 30
# Settings in which runs may differ and still differ in nothing but the seed.
BESIDE_THE_POINT = {"run_name", "output_dir", "resume", "environment", "reward_function", "problems", "data"}
Values = dict[int, float]  # step to value


@dataclass(frozen=True)
class Panel:
    """Some metrics over the rollout batches.

    lines: metric to label. Of several runs, only the first one is drawn.
    alarms: kinds of the alarms that are marked.
    spread: metrics of the lower and the upper edge of an area around the first line.
    band: the values of a healthy run.
    top: what the vertical axis reaches at least, from 0 on; 0: it follows the values.
    """

    title: str
    lines: dict[str, str]
    alarms: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    band: tuple[float, ...] = ()
    top: float = 0.0


REWARD = Panel("Reward and held-out pass@1", {"reward_mean": "mean reward"}, ("held-out",), top=0.1)
CLIPPING = Panel(
    "Clip fraction (grey: by minibatch)",
    {"clip_fraction_eligible": "of tokens that can clip", "clip_fraction": "of all"},
    ("clip", "clips most", "clips nothing", "null clip"),
    band=CLIP_BAND,
    top=0.4,
)
PANELS = (
    REWARD,
    CLIPPING,
    Panel(
        "Importance ratio (area: smallest to largest)",
        {"importance_ratio_mean": "mean"},
        ("ratio", "sequence ratio", "ratio spread", "stale sampler"),
        spread=("importance_ratio_min", "importance_ratio_max"),
    ),
    Panel("Gradient norm", {"grad_norm": "before clipping"}, ("gradient",)),
    Panel("Response length", {"response_tokens_mean": "tokens, mean"}, ("text",)),
    Panel("Entropy", {"entropy": "nats per token"}, ("entropy",)),
    Panel(
        "Tied groups; responses cut off",
        {
            "zero_variance_groups": "tied",
            "groups_all_wrong": "all wrong",
            "groups_all_right": "all right",
            "truncated_fraction": "cut off",
        },
        ("no signal",),
        top=1.0,
    ),
    Panel(
        "Seconds per rollout batch",
        {
            "generation_s": "sampling",
            "reward_s": "rewards",
            "log_prob_s": "log-probs",
            "update_s": "updates",
        },
        top=0.1,
    ),
)


@dataclass(frozen=True)
class Line:
    """Values over rollout batches.

    kind: "line"; "points", joined by dashes; "faint"; or "low", whose line stays invisible, and after it
        "high", the edges of an area.
    """

    label: str
    colour: str
    kind: str
    x: list[int]
    y: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines, of which later ones lie over earlier ones, with marks; band and top as in Panel."""

    title: str
    lines: list[Line]
    marks: list[Alarm]
    band: tuple[float, ...]
    top: float


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each of PANELS."""
    return [_chart(panel, runs) for panel in PANELS]


def _chart(panel: Panel, runs: Sequence[RunRecord]) -> Chart:
    is_one = len(runs) == 1
    title = panel.title if is_one or len(panel.lines) == 1 else f"{panel.title}: {[*panel.lines.values()][0]}"
    marked = (*panel.alarms, EMERGENCY_STOP) if is_one else (EMERGENCY_STOP,)
    return Chart(
        title=title,
        lines=_lines_of_one(panel, runs[0]) if is_one else _lines_of_several(panel, runs),
        marks=[alarm for run in runs for alarm in run.alarms if alarm.kind in marked],
        band=() if any(run.clips_per_token for run in runs) else panel.band,
        top=panel.top,
    )


def _lines_of_one(panel: Panel, run: RunRecord) -> list[Line]:
    lines = []
    for name, kind in zip(panel.spread, ("low", "high"), strict=False):
        lines.append(_line(name.rpartition("_")[2], 0, kind, _values(run, name)))
    if panel is CLIPPING:
        lines += _minibatches(run)
    for colour, (name, label) in enumerate(panel.lines.items()):
        values = _values(run, name)
        if len(values) >= LEAST_TO_SMOOTH:
            lines.append(_line(f"{label}, this batch", colour, "faint", values))
        lines.append(_line(label, colour, "line", _smooth(values)))
    if panel is REWARD:
        for i, (label, kind) in enumerate([("95 % from", "low"), ("to", "high")]):
            edge = {evaluation["step"]: evaluation["interval_95"][i] for evaluation in run.evaluations}
            lines.append(_line(label, 1, kind, edge))
        lines.append(_line("held-out pass@1, 95 %", 1, "points", _passed(run)))
    return lines


def _lines_of_several(panel: Panel, runs: Sequence[RunRecord]) -> list[Line]:
    """The first line of a panel for each group of runs."""
    name = next(iter(panel.lines))
    lines = []
    for colour, (label, same) in enumerate(groups_of(runs).items()):
        lines += _band(label, colour, "line", [_smooth(_values(run, name)) for run in same])
        if panel is REWARD:
            lines += _band(f"{label}: held-out pass@1", colour, "points", [_passed(run) for run in same])
    return lines


def _band(label: str, colour: int, kind: str, runs: Sequence[Values]) -> list[Line]:
    """The mean of some runs at each step, and the lowest and the highest value if there are several runs."""
    steps = sorted({step for run in runs for step in run})
    at = {step: [run[step] for run in runs if step in run] for step in steps}
    mean = _line(label, colour, kind, {step: fmean(values) for step, values in at.items()})
    if len(runs) == 1:
        return [mean]
    low = _line("lowest", colour, "low", {step: min(values) for step, values in at.items()})
    high = _line("highest", colour, "high", {step: max(values) for step, values in at.items()})
    return [low, high, mean]


def _minibatches(run: RunRecord) -> list[Line]:
    """The clip fraction of each minibatch after the first, which cannot clip."""
    shares = {batch["step"]: batch["clip_fraction_by_minibatch"] for batch in run.metrics}
    count = min(MOST_MINIBATCHES, max(map(len, shares.values()), default=0))
    lines = []
    for i in range(1, count):
        values = {step: each[i] for step, each in shares.items() if i < len(each)}
        lines.append(_line(f"minibatch {i + 1}", GREY, "faint", _smooth(values)))
    return lines


def _line(label: str, colour: int, kind: str, values: Values) -> Line:
    return Line(label, COLOURS[colour % len(COLOURS)], kind, list(values), list(values.values()))


def _values(run: RunRecord, name: str) -> Values:
    return {batch["step"]: batch[name] for batch in run.metrics}


def _passed(run: RunRecord) -> Values:
    return {evaluation["step"]: evaluation["pass_at_1"] for evaluation in run.evaluations}


def _smooth(values: Values) -> Values:
    """The mean of each value and its neighbours, a twentieth of all on either side; of few, the values."""
    numbers = list(values.values())
    reach = len(numbers) // 20 if len(numbers) >= LEAST_TO_SMOOTH else 0
    return {
        step: fmean(numbers[max(0, i - reach) : i + reach + 1]) for i, step in enumerate(values)
    }


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
