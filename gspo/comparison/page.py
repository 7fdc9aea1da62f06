"""report.html and comparison.png of a comparison: its tables over the curves of its settings."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.comparison.outcomes import Outcome
from gspo.comparison.table import difference_rows, setting_rows
from gspo.report.charts import COLOURS, Group
from gspo.report.page import section, table, tag, text, write_page
from gspo.report.run_record import RunRecord
from gspo.training.whole_folders import write_whole

DIFFERENCES = (
    "Paired by seed and by problem, with 95 % intervals over both: other seeds and other problems would give "
    "a difference in this interval 19 times in 20."
)


def write_comparison(
    title: str, result: Mapping[str, Any], arms: Mapping[str, Sequence[Outcome]], folder: Path
) -> None:
    """Write both files into a folder. Raises CannotSave."""
    groups = [Group(label, [_named(outcome) for outcome in outcomes]) for label, outcomes in arms.items()]
    runs = [run for group in groups for run in group.runs]
    head = tag("h1", text(title)) + table(setting_rows(result))
    if result["differences"]:
        head += section("Differences", DIFFERENCES, [table(difference_rows(result))])
    head += section("Notes", "", [tag("p", text(note)) for note in result["notes"]])
    if runs:
        write_page(runs, folder / "report.html", groups, head)
        draw_comparison(groups, folder / "comparison.png")


def _named(outcome: Outcome) -> RunRecord:
    return replace(outcome.run, name=f"{outcome.cell.arm}, seed {outcome.cell.seed}")


def draw_comparison(groups: Sequence[Group], path: Path) -> None:
    """Draw held-out pass@1 and clip fraction of each group: the mean, from the lowest to the highest seed.

    Raises CannotSave.
    """
    # Imported here: it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    passed, clipped = figure.subplots(1, 2)
    for i, (label, runs) in enumerate(groups):
        colour = COLOURS[i % len(COLOURS)]
        evaluations = [{e["step"]: e["pass_at_1"] for e in run.evaluations} for run in runs]
        _draw_mean(passed, evaluations, colour, label)
        name = "clip_fraction_eligible"
        fractions = [{m["step"]: m[name] for m in run.metrics if name in m} for run in runs]
        _draw_mean(clipped, fractions, colour, label)
    passed.set_title("Held-out pass@1", loc="left", fontweight="bold")
    clipped.set_title("Clipped, of the tokens that can clip", loc="left", fontweight="bold")
    clipped.set_yscale("symlog", linthresh=1e-3)
    for ax in (passed, clipped):
        ax.set_xlabel("rollout batch")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = passed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(groups)), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _draw_mean(ax: Any, seeds: Sequence[Mapping[int, float]], colour: str, label: str) -> None:
    """Draw the mean over the seeds at the steps that all of them have."""
    steps = sorted(set[int]().union(*seeds).intersection(*seeds))
    values = [[seed[step] for seed in seeds] for step in steps]
    ax.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, list(map(fmean, values)), color=colour, label=f"{label} ({len(seeds)} seeds)", lw=2)
