"""training_curves.png: a run at a glance, readable at half its size."""

import math
import textwrap
from pathlib import Path
from typing import Any

from gspo.report.panels import CLIPPING, LEAST_TO_SMOOTH, PANELS, REWARD, Panel, minibatches, smooth
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.whole_folders import saving

COLOURS = ("#2563eb", "#ea7a0b", "#0f9f6e", "#b4309c")
RIGHT, WRONG, ALARM, FAINT = "#0f9f6e", "#ea7a0b", "#dc2626", "#9ca3af"
AREAS = {"groups_all_right": "#86d6b8", "groups_all_wrong": "#f5c08a"}


def draw_curves(run: RunRecord, path: Path) -> None:
    """Draw the panels, and beside them what the run has come to.

    Raises:
        CannotSave: the disk is full.
    """
    # Imported here: it takes a second, and a run goes on without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), dpi=90)
    FigureCanvasAgg(figure)
    # An automatic layout takes seconds.
    figure.subplots_adjust(left=0.04, right=0.98, top=0.93, bottom=0.05, wspace=0.22, hspace=0.38)
    *axes, words = figure.subplots(3, 3).flat
    for panel, ax in zip(PANELS, axes, strict=True):
        _draw(run, panel, ax)
    for ax in axes[-3:]:
        ax.set_xlabel("rollout batch", fontsize=13)
    words.axis("off")
    headline, *others = verdict(run)
    text = [textwrap.fill(run.name, 34), textwrap.fill(headline, 34), *(textwrap.fill(s, 46) for s in others)]
    shown = "\n\n".join(text).splitlines()[:15]
    words.text(
        -0.05, 1.1, "\n".join(shown), va="top", fontsize=13, parse_math=False, transform=words.transAxes
    )
    partial = path.with_suffix(".partial")
    with saving(path):
        figure.savefig(partial, format="png")
        partial.replace(path)


def _draw(run: RunRecord, panel: Panel, ax: Any) -> None:
    steps = [batch["step"] for batch in run.metrics]
    values = {name: [batch[name] for batch in run.metrics] for name in (*panel.lines, *panel.spread)}
    is_long = len(steps) >= LEAST_TO_SMOOTH
    shown = {name: smooth(each) if is_long else each for name, each in values.items()}
    faintness = 0.35 if len(steps) < 200 else 0.12  # of lines that go up and down at every rollout batch
    if panel.band:
        ax.axhspan(*panel.band, color=RIGHT, alpha=0.15, lw=0, label="usual")
    if panel.spread:
        low, high = (values[name] for name in panel.spread)
        ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.25, lw=0, label="smallest to largest")
    if panel is CLIPPING:
        for i, clipped in enumerate(minibatches(run.metrics).values()):
            known = [math.nan if share is None else share for share in clipped]
            label = None if i else "by minibatch"
            ax.plot(steps, known, color=FAINT, lw=0.8, alpha=2 * faintness, label=label)
    if panel.stacked:
        names = panel.stacked
        colours = [AREAS.get(name, colour) for name, colour in zip(names, COLOURS, strict=False)]
        areas, labels = [shown[name] for name in names], [panel.lines[name] for name in names]
        ax.stackplot(steps, *areas, labels=labels, colors=colours, alpha=0.8)
    for (name, label), colour in zip(panel.lines.items(), COLOURS, strict=False):
        if name in panel.stacked:
            continue
        own = ax.twinx() if name in panel.second else ax
        if own is not ax:
            own.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1))
            own.tick_params(labelsize=13, colors=colour)
            own.spines[["top", "right"]].set_visible(False)
        own.plot(steps, shown[name], "-" if is_long else "o-", color=colour, lw=2.2, markersize=4)
        if is_long:
            own.plot(steps, values[name], color=colour, lw=0.8, alpha=faintness)
        ax.plot([], [], color=colour, lw=2.2, label=label)
    if panel is REWARD:
        _draw_evaluations(run, ax)
    alarms = [alarm for alarm in run.alarms if alarm.kind in panel.alarms]
    for i, alarm in enumerate(alarms):
        ax.axvspan(alarm.first - 0.5, alarm.last + 0.5, color=ALARM, alpha=0.15, lw=0)
        if alarm.kind not in {earlier.kind for earlier in alarms[:i]}:
            ax.text(alarm.first - 0.5, 0.97, f"! {alarm.kind}", color=ALARM, fontsize=13, fontweight="bold",
                    va="top", transform=ax.get_xaxis_transform(), clip_on=True)  # fmt: skip
    if run.emergency:
        ax.axvline(run.emergency["step"], color=ALARM, lw=2.5)
        ax.text(run.emergency["step"], 0.5, "emergency stop", color=ALARM, fontsize=13, rotation=90,
                ha="right", va="center", transform=ax.get_xaxis_transform())  # fmt: skip
    # With a height given, matplotlib need not look for one, which takes a quarter of all the time.
    ax.set_title(panel.title, fontsize=17, fontweight="bold", loc="left", y=1.0, pad=26)
    ax.tick_params(labelsize=13)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if panel.top:
        ax.set_ylim(min(0, ax.get_ylim()[0]), max(panel.top, ax.get_ylim()[1]))
    ax.legend(fontsize=12, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4, frameon=False,
              handlelength=1, columnspacing=1, handletextpad=0.4)  # fmt: skip


def _draw_evaluations(run: RunRecord, ax: Any) -> None:
    """Draw held-out pass@1 with its 95 % intervals."""
    steps = [evaluation["step"] for evaluation in run.evaluations]
    passed = [evaluation["pass_at_1"] for evaluation in run.evaluations]
    intervals = [evaluation["interval_95"] for evaluation in run.evaluations]
    below = [max(0, p - low) for p, (low, _) in zip(passed, intervals, strict=True)]
    above = [max(0, high - p) for p, (_, high) in zip(passed, intervals, strict=True)]
    label = "held-out pass@1, 95 %"
    ax.errorbar(steps, passed, [below, above], fmt="o--", color=WRONG, capsize=4, lw=1.8, label=label)
