"""report.html: one file with the verdicts, curves and texts of one run or several; it needs no network."""

import html
import json
import math
import shlex
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.report.charts import charts, differences, gains_by_seed
from gspo.report.panels import LEAST_TO_SMOOTH
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.command_line import escaped
from gspo.training.whole_folders import write_whole

HERE = Path(__file__).parent
# Characters of texts in a page, shared among its runs; and of one text.
ALL_CHARACTERS, TEXT_CHARACTERS = 1_200_000, 3000
NOTE = (
    "Over rollout batches. The values at the cursor stand below each chart; drag to zoom, double-click to go "
    f"back. From {LEAST_TO_SMOOTH} rollout batches on, strong lines are means over neighbours. Of several "
    "seeds, a line is the mean and the area around it goes from the lowest to the highest."
)
# Control characters that stay in a text.
KEPT = "\n\t"


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page. Raises CannotSave."""
    data = {
        "charts": charts(runs),
        "runs": [describe(run, ALL_CHARACTERS // len(runs)) for run in runs],
        "differences": differences(runs),
        "seeds": gains_by_seed(runs),
        "note": NOTE,
    }
    # Text within a script element ends at "</script", wherever it stands.
    text = json.dumps(plain(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(escaped(", ".join(run.name for run in runs))),
        "STYLE": (HERE / "uplot" / "uPlot.min.css").read_text("utf-8")
        + (HERE / "page.css").read_text("utf-8"),
        "UPLOT": (HERE / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "page.js").read_text(encoding="utf-8"),
        "DATA": text,  # last: a text in it may look like a placeholder
    }
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    write_whole(path, page)


# ---- text that may hold anything


def plain(value: Any) -> Any:
    """The value for JSON: texts are cut, controls visible, figures rounded or, if not finite, null."""
    match value:
        case dict():
            return {escaped(str(name)): plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float():
            return float(f"{value:.5g}") if math.isfinite(value) else None
        case str() if len(value) > TEXT_CHARACTERS:
            left = len(value) - TEXT_CHARACTERS
            return f"{escaped(value[:TEXT_CHARACTERS], KEPT)} ... ({left} more characters)"
        case str():
            return value if value.isprintable() else escaped(value, KEPT)
        case int() | None:
            return value
    return escaped(str(value))


# ---- what a page says of a run


def describe(run: RunRecord, characters: int) -> dict:
    """The verdict, configuration, alarms and texts of a run; characters: how many the texts may have."""
    environment = run.config.get("environment")
    made = dict(environment) if isinstance(environment, dict) else {}
    command = made.pop("command_line", None)
    if isinstance(command, list):
        made = {"command_line": shlex.join(map(str, command))} | made
    problems = changed_problems(run)
    samples = best_and_worst(run)
    return {
        "name": run.name,
        "verdict": verdict(run),
        "config": made | {name: value for name, value in run.config.items() if name != "environment"},
        "alarms": [{"kind": a.kind, "when": a.when, "message": a.message} for a in run.alarms],
        "damage": run.damage,
        "problems": fitting(problems, characters * 2 // 3),
        "all_problems": len(problems),
        "samples": evenly(samples, characters // 3),
        "all_samples": len(samples),
        "emergency_samples": run.emergency_samples[:8],
    }


def changed_problems(run: RunRecord) -> list[dict]:
    """Held-out problems with their first and their last responses, those whose reward changed most first."""
    by_problem: dict[Any, list[dict]] = {}
    for line in run.eval_samples:
        by_problem.setdefault(str(line.get("problem")), []).append(line)
    found = []
    for name, (before, *later) in by_problem.items():
        after = later[-1] if later else before
        change = earned(after) - earned(before)
        found.append({"problem": name, "before": before, "after": after, "change": change})
    return sorted(found, key=lambda problem: -abs(problem["change"]))


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


def size(text: dict) -> int:
    return len(json.dumps(plain(text), ensure_ascii=False))


def fitting(texts: Sequence[dict], characters: int) -> list[dict]:
    """The first of the texts, as many as have so many characters together."""
    totals = accumulate(map(size, texts))
    return [text for text, total in zip(texts, totals, strict=True) if total <= characters]


def evenly(texts: Sequence[dict], characters: int) -> list[dict]:
    """The last of the texts and every n-th before it, with about so many characters together."""
    stride = max(1, math.ceil(sum(map(size, texts)) / characters))
    return list(texts[::-1][::stride][::-1])
