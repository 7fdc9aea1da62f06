"""What a comparison leaves in its folder: the figures as JSON and text, a page, and a picture of curves."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.comparison.claims import made_on, markdown
from gspo.comparison.outcomes import Outcome
from gspo.comparison.table import difference_rows, render, setting_rows
from gspo.printing import counted
from gspo.report.charts import COLOURS, Group
from gspo.report.page import folded, section, table, tag, text, write_page
from gspo.report.run_record import RunRecord
from gspo.training.whole_folders import write_whole

TITLE = "Is the paper right? (GSPO, arXiv 2507.18071)"
DASHES = ("-", "--", ":")  # where there are more lines than colours
DIFFERENCES = (
    "Paired by seed and by problem, with 95 % intervals over both: other seeds and other problems would give "
    "a difference in this interval 19 times in 20."
)


def write_comparison(result: Mapping[str, Any], arms: Mapping[str, Sequence[Outcome]], folder: Path) -> None:
    """Write comparison.json, table.txt, report.html and comparison.png into a folder. Raises CannotSave."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "comparison.json", json.dumps(result, indent=1))
    write_whole(folder / "table.txt", render(result) + "\n")
    title = " and ".join(arms) if len(arms) < 3 else f"{len(arms)} settings"
    runs = _named_runs(arms)
    if runs:
        groups = _groups(arms)
        write_page(runs, folder / "report.html", groups, tag("h1", text(title)) + _tables(result))
        draw_comparison(groups, folder / "comparison.png")


def write_claims(
    result: Mapping[str, Any], outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]], folder: Path
) -> None:
    """Write paper.json, claims.md, report.html and a picture of each section. Raises CannotSave."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "paper.json", json.dumps(result, indent=1))
    write_whole(folder / "claims.md", markdown(result) + "\n")
    rows = [list(claim.values()) for claim in result["claims"]]
    head = tag("h1", TITLE) + table([["the claim", "the paper", "measured here", "holds?"], *rows])
    head += tag("p", text(made_on(result)), kind="faint")
    for key, section_result in result["sections"].items():
        head += folded(text(section_result["title"]), _tables(section_result))
        draw_comparison(_groups(outcomes[key]), folder / f"{key}.png")
    first = next(arms for arms in outcomes.values() if any(arms.values()))
    write_page(_named_runs(first), folder / "report.html", _groups(first), head)


def _named_runs(arms: Mapping[str, Sequence[Outcome]]) -> list[RunRecord]:
    """The runs under their setting's name."""
    outcomes = [outcome for arm in arms.values() for outcome in arm]
    return [replace(each.run, name=f"{each.cell.arm}, seed {each.cell.seed}") for each in outcomes]


def _groups(arms: Mapping[str, Sequence[Outcome]]) -> list[Group]:
    """Each setting's runs, to be drawn as one line.

    A run that died keeps its last evaluation, as in the tables.
    """
    outcomes = [outcome for arm in arms.values() for outcome in arm]
    steps = sorted({evaluation["step"] for outcome in outcomes for evaluation in outcome.run.evaluations})
    return [Group(label, [_drawn(outcome, steps) for outcome in own]) for label, own in arms.items()]


def _tables(result: Mapping[str, Any]) -> str:
    head = table(setting_rows(result))
    if result["differences"]:
        head += section("Differences", DIFFERENCES, [table(difference_rows(result))])
    return head + section("Notes", "", [tag("p", text(note)) for note in result["notes"]])


def _drawn(outcome: Outcome, steps: Sequence[int]) -> RunRecord:
    evaluations = list(outcome.run.evaluations)
    if outcome.died:
        last = evaluations[-1]
        evaluations += [last | {"step": step} for step in steps if last["step"] < step <= outcome.end]
    return replace(outcome.run, evaluations=evaluations)


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
        style = {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[i // len(COLOURS) % len(DASHES)]}
        evaluations = [{e["step"]: e["pass_at_1"] for e in run.evaluations} for run in runs]
        _draw_mean(passed, evaluations, style, label)
        name = "clip_fraction_eligible"
        fractions = [{m["step"]: m[name] for m in run.metrics if name in m} for run in runs]
        _draw_mean(clipped, fractions, style, label)
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


def _draw_mean(ax: Any, seeds: Sequence[Mapping[int, float]], style: Mapping[str, str], label: str) -> None:
    """Draw the mean over the seeds at the steps that all of them have."""
    steps = sorted(set[int]().union(*seeds).intersection(*seeds))
    values = [[seed[step] for seed in seeds] for step in steps]
    low, high = list(map(min, values)), list(map(max, values))
    ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
    ax.plot(steps, list(map(fmean, values)), label=f"{label} ({counted(len(seeds), 'seed')})", lw=2, **style)
