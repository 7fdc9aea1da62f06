"""training_curves.png: a run at a glance, readable at half its size."""

import io
import math
import textwrap
from pathlib import Path
from typing import Any

from gspo.report.charts import Chart, charts
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.whole_folders import write_whole

ALARM = "#dc2626"
# Inches: of a row of two charts, of all above the first row, and below the last one.
ROW_HEIGHT, HEADING, MARGIN = 3.5, 1.54, 0.42
STYLES: dict[str, dict] = {
    "line": {"lw": 2.2},
    "points": {"lw": 1.8, "ls": "--", "marker": "o"},
    "faint": {"lw": 0.8, "alpha": 0.4},
}


def draw_curves(run: RunRecord, path: Path) -> None:
    """Draw the charts under the run's outcome. Raises CannotSave."""
    # Imported here: it takes a second, and the page needs none.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = charts([run])
    num_rows = math.ceil(len(drawn) / 2)
    height = ROW_HEIGHT * max(num_rows, 1)
    figure = Figure(figsize=(13, height), dpi=90)
    FigureCanvasAgg(figure)
    # An automatic layout takes seconds.
    top, bottom = 1 - HEADING / height, MARGIN / height
    figure.subplots_adjust(left=0.07, right=0.98, top=top, bottom=bottom, wspace=0.15, hspace=0.5)
    outcome = textwrap.fill(f"{run.name}: {verdict(run)[0]}", 90)
    figure.suptitle(outcome, x=0.01, ha="left", fontsize=17, parse_math=False)
    for number, chart in enumerate(drawn, start=1):
        _draw(chart, figure.add_subplot(num_rows, 2, number))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _draw(chart: Chart, ax: Any) -> None:
    low: list[float] = []
    for line in chart.lines:
        if line.kind == "low":
            low = line.y
        elif line.kind == "high":
            ax.fill_between(line.x, low, line.y, color=line.colour, alpha=0.25)
        else:
            label = "_" if line.kind == "faint" else line.label
            ax.plot(line.x, line.y, color=line.colour, label=label, **STYLES[line.kind])
    for mark in chart.marks:
        ax.axvspan(mark.first - 0.5, mark.last + 0.5, color=ALARM, alpha=0.2, lw=0)
    # With a height given, matplotlib need not look for one, which takes a quarter of all the time.
    colour = ALARM if chart.marks else "black"
    ax.set_title(chart.title, fontsize=18, fontweight="bold", loc="left", y=1.0, pad=28, color=colour)
    ax.tick_params(labelsize=15)
    ax.set_xlabel("rollout batch", fontsize=13, loc="right", labelpad=-2)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if chart.top:
        ax.set_ylim(min(0, ax.get_ylim()[0]), max(chart.top, ax.get_ylim()[1]))
    ax.legend(fontsize=14, loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncols=4, frameon=False,
              handlelength=1, columnspacing=0.7, handletextpad=0.4)  # fmt: skip
