"""training_curves.png: a run at a glance, readable at half its size."""

import textwrap
from pathlib import Path
from typing import Any

from gspo.report.charts import Chart, charts
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.whole_folders import saving

GOOD, ALARM = "#12a975", "#dc2626"
STYLES: dict[str, dict] = {
    "line": {"lw": 2.2},
    "points": {"lw": 1.8, "ls": "--", "marker": "o"},
    "faint": {"lw": 0.8, "alpha": 0.4},
}


def draw_curves(run: RunRecord, path: Path) -> None:
    """Draw the charts, and beside them what the run has come to. Raises CannotSave."""
    # Imported here: it takes a second, and a run goes on without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), dpi=90)
    FigureCanvasAgg(figure)
    # An automatic layout takes seconds.
    figure.subplots_adjust(left=0.04, right=0.98, top=0.93, bottom=0.05, wspace=0.2, hspace=0.38)
    *axes, words = figure.subplots(3, 3).flat
    for chart, ax in zip(charts([run]), axes, strict=True):
        _draw(chart, ax)
    headline, *others = verdict(run)
    text = [textwrap.fill(run.name, 34), textwrap.fill(headline, 34), *(textwrap.fill(s, 46) for s in others)]
    shown = "\n".join("\n\n".join(text).splitlines()[:15])
    words.axis("off")
    words.text(-0.05, 1.1, shown, va="top", fontsize=13, parse_math=False, transform=words.transAxes)
    partial = path.with_suffix(".partial")
    with saving(path):
        figure.savefig(partial, format="png")
        partial.replace(path)


def _draw(chart: Chart, ax: Any) -> None:
    if chart.band:
        ax.axhspan(*chart.band, color=GOOD, alpha=0.15, lw=0, label="usual")
    low: list[float] = []
    for line in chart.lines:
        if line.kind == "low":
            low = line.y
        elif line.kind == "high":
            ax.fill_between(line.x, low, line.y, color=line.colour, alpha=0.25)
        else:
            label = "_" if line.kind == "faint" else line.label
            ax.plot(line.x, line.y, color=line.colour, label=label, **STYLES[line.kind])
    for i, mark in enumerate(chart.marks):
        ax.axvspan(mark.first - 0.5, mark.last + 0.5, color=ALARM, alpha=0.2, lw=0)
        if mark.kind not in {earlier.kind for earlier in chart.marks[:i]}:
            ax.text(mark.first - 0.5, 0.97, f"! {mark.kind}", color=ALARM, fontsize=13, fontweight="bold",
                    va="top", transform=ax.get_xaxis_transform())  # fmt: skip
    # With a height given, matplotlib need not look for one, which takes a quarter of all the time.
    ax.set_title(chart.title, fontsize=16, fontweight="bold", loc="left", y=1.0, pad=26)
    ax.tick_params(labelsize=13)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if chart.top:
        ax.set_ylim(min(0, ax.get_ylim()[0]), max(chart.top, ax.get_ylim()[1]))
    ax.legend(fontsize=12, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4, frameon=False,
              handlelength=1, columnspacing=1, handletextpad=0.4)  # fmt: skip
