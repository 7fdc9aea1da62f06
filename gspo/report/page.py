"""report.html: one file with the verdicts, curves and texts of one run or several; it needs no network."""

import dataclasses
import html
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.report.charts import charts, differences
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.command_line import escaped
from gspo.training.whole_folders import write_whole

HERE = Path(__file__).parent
# Held-out problems, and pairs of samples, in a page; they are shared among its runs.
MOST_TEXTS = 40
TEXT_CHARACTERS = 3000


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page. Raises CannotSave."""
    data = {
        "charts": [dataclasses.asdict(chart) for chart in charts(runs)],
        "runs": [describe(run, max(4, MOST_TEXTS // len(runs))) for run in runs],
        "differences": differences(runs) if len(runs) > 1 else {},
    }
    # Text within a script element ends at "</script", wherever it stands.
    text = json.dumps(plain(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "{{TITLE}}": html.escape(escaped(", ".join(run.name for run in runs))),
        "{{UPLOT_STYLE}}": (HERE / "uplot" / "uPlot.min.css").read_text(encoding="utf-8"),
        "{{STYLE}}": (HERE / "page.css").read_text(encoding="utf-8"),
        "{{UPLOT}}": (HERE / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        "{{SCRIPT}}": (HERE / "page.js").read_text(encoding="utf-8"),
        "{{DATA}}": text,  # last: a text in it may look like a placeholder
    }
    for name, part in parts.items():
        page = page.replace(name, part)
    write_whole(path, page)


def plain(value: Any) -> Any:
    """The value for JSON: texts are cut, controls visible, figures rounded or, if not finite, null."""
    match value:
        case dict():
            return {escaped(str(name)): plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float():
            return float(f"{value:.5g}") if math.isfinite(value) else None
        case int() | None:
            return value
    text = str(value)
    left = len(text) - TEXT_CHARACTERS
    return escaped(text[:TEXT_CHARACTERS], "\n\t") + (f" ... ({left} more characters)" if left > 0 else "")


def describe(run: RunRecord, most: int) -> dict:
    """The verdict, configuration, alarms and texts of a run; most: held-out problems, and pairs of samples."""
    config = dict(run.config)
    environment = config.pop("environment", {})
    command = environment.get("command_line", [])
    problems, pairs = changed_problems(run), best_and_worst(run)
    return {
        "name": run.name,
        "verdict": verdict(run),
        "config": {"command": shlex.join(map(str, command)), **environment, **config},
        "alarms": [{"kind": alarm.kind, "when": alarm.when, "message": alarm.message} for alarm in run.alarms],
        "damage": run.damage,
        "problems": problems[:most],
        "all_problems": len(problems),
        "samples": pairs[:: math.ceil(len(pairs) / most) or 1],
        "all_samples": len(pairs),
        "emergency_samples": run.emergency_samples[:8],
    }


def changed_problems(run: RunRecord) -> list[dict]:
    """Held-out problems with their first and their last responses, those whose reward changed most first."""
    by_problem: dict[str, list[dict]] = {}
    for line in run.eval_samples:
        by_problem.setdefault(str(line.get("problem")), []).append(line)
    found = []
    for name, lines in by_problem.items():
        before, after = lines[0], lines[-1]
        means = [earned(before), earned(after)]
        found.append({"problem": name, "before": before, "after": after, "means": means})
    return sorted(found, key=lambda problem: -abs(problem["means"][1] - problem["means"][0]))


def earned(line: dict) -> float:
    """Mean reward of the responses to a problem; 0 for one that could not be judged."""
    rewards = line.get("rewards")
    numbers = [x if isinstance(x, int | float) else 0.0 for x in rewards] if isinstance(rewards, list) else []
    return fmean(numbers) if numbers else 0.0


def best_and_worst(run: RunRecord) -> list[dict]:
    """The best and the worst response of each rollout batch, oldest first."""
    pairs: dict[int, dict] = {}
    for sample in run.samples:
        pairs.setdefault(sample["step"], {"step": sample["step"]})[str(sample.get("kind"))] = sample
    return list(pairs.values())
