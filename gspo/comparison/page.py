"""report.html and comparison.png of a comparison: its tables over the curves of its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo.comparison.outcomes import Outcome
from gspo.comparison.table import difference_rows, setting_rows
from gspo.report.charts import Group, charts
from gspo.report.curves import draw_charts
from gspo.report.page import section, table, tag, text, write_page

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
    if len(runs) > 1:
        write_page(runs, folder / "report.html", groups, head)
        draw_charts(charts(runs, groups), title, folder / "comparison.png")


def _named(outcome: Outcome) -> Any:
    return replace(outcome.run, name=f"{outcome.cell.arm}, seed {outcome.cell.seed}")
