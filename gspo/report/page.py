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

from gspo.report.panels import CLIPPING, LEAST_TO_SMOOTH, PANELS, REWARD, Panel, minibatches, smooth
from gspo.report.run_record import RunRecord
from gspo.report.verdict import verdict
from gspo.training.command_line import escaped
from gspo.training.whole_folders import write_whole

HERE = Path(__file__).parent
# Characters of texts in a page, shared among its runs; and of one text.
ALL_CHARACTERS, TEXT_CHARACTERS = 1_200_000, 3000
NOTE = (
    "Over rollout batches. The values at the cursor stand below each chart; drag to zoom, double-click to go "
    f"back. From {LEAST_TO_SMOOTH} rollout batches on, strong lines are means over neighbours. An area around "
    "a line of several seeds goes from the lowest to the highest."
)
# Control characters that stay in a text.
KEPT = "\n\t"
# Rollout batches whose best and worst responses a page shows.
MOST_PAIRS = 40
# Settings in which runs may differ and still be the same but for the seed.
BESIDE_THE_POINT = {"seed", "run_name", "output_dir", "resume", "environment", "reward_function"}


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page. Raises CannotSave."""
    data = {
        "charts": [chart(panel, runs) for panel in PANELS],
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
            return escaped(value, KEPT)
        case int() | None:
            return value
    return escaped(str(value))


# ---- what a page says of a run


def describe(run: RunRecord, characters: int) -> dict:
    """The verdict, configuration, alarms and texts of a run; characters: how many the texts may have."""
    environment = run.config.get("environment", {})
    details = environment if isinstance(environment, dict) else {}
    command = details.get("command_line", [])
    gpus = details.get("gpus") or []
    facts = {
        "command": shlex.join(map(str, command)) if isinstance(command, list) else command,
        "model": run.config.get("model_name"),
        "algorithm": run.config.get("algorithm"),
        "data": run.config.get("data"),
        "commit": details.get("git_commit"),
        "hardware": f"{gpus or 'no GPU'}, {details.get('cpu_cores')} cores, {details.get('platform')}",
        "versions": details.get("versions"),
    }
    problems = changed_problems(run)
    samples = best_and_worst(run)
    return {
        "name": run.name,
        "verdict": verdict(run),
        "facts": {name: value for name, value in facts.items() if value},
        "config": {name: value for name, value in run.config.items() if name != "environment"},
        "alarms": [{"kind": a.kind, "when": a.when, "message": a.message} for a in run.alarms],
        "damage": run.damage,
        "problems": fitting(problems, characters * 2 // 3),
        "all_problems": len(problems),
        "samples": evenly(samples, characters // 3),
        "all_samples": len(samples),
        "emergency": run.emergency,
        "emergency_samples": run.emergency_samples[:8],
    }


def changed_problems(run: RunRecord) -> list[dict]:
    """Held-out problems with their first and their last responses, those whose reward changed most first."""
    by_problem: dict[Any, list[dict]] = {}
    for line in run.eval_samples:
        by_problem.setdefault(str(line.get("problem")), []).append(line)
    found = [
        {
            "problem": name,
            "before": lines[0],
            "after": lines[-1],
            "change": earned(lines[-1]) - earned(lines[0]),
        }
        for name, lines in by_problem.items()
    ]
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
    stride = max(math.ceil(sum(map(size, texts)) / characters), math.ceil(len(texts) / MOST_PAIRS), 1)
    return list(texts[::-1][::stride][::-1])


# ---- several runs, and curves


def groups_of(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ only in their seed, together: a label to runs."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name not in BESIDE_THE_POINT}
        groups.setdefault(json.dumps(settings, sort_keys=True) if settings else run.name, []).append(run)
    # One setting tells the groups apart, or the first three do.
    varied = {name: values for name, values in differences(runs).items() if name != "seed"}
    ways = {
        name: len({str(values[runs.index(same[0])]) for same in groups.values()})
        for name, values in varied.items()
    }
    alone = [name for name, count in ways.items() if count == len(groups)]
    telling = {name: varied[name] for name in alone[:1] or list(varied)[:3]}
    labels: dict[str, list[RunRecord]] = {}
    for same in groups.values():
        label = ", ".join(f"{name} {values[runs.index(same[0])]}" for name, values in telling.items())
        label = label if label and len(groups) > 1 else same[0].name
        label = f"{label} ({len(same)} seeds)" if len(same) > 1 else label
        labels[label if label not in labels else f"{label}, {same[0].name}"] = same
    return labels


def differences(runs: Sequence[RunRecord]) -> dict[str, list]:
    """The settings in which the runs differ: name to the value of each."""
    names = {name: None for run in runs for name in run.config}
    values = {name: [run.config.get(name) for run in runs] for name in names}
    beside = BESIDE_THE_POINT - {"seed"} | {"problems"}
    return {n: v for n, v in values.items() if n not in beside and any(x != v[0] for x in v)}


def gains_by_seed(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each group of runs that differ only in their seed, on their gains in pass@1."""
    sentences = []
    for label, same in groups_of(runs).items():
        ends = [(run.evaluations[0], run.evaluations[-1]) for run in same if len(run.evaluations) > 1]
        gains = [after["pass_at_1"] - before["pass_at_1"] for before, after in ends]
        if len(gains) > 1:
            sentences.append(
                f"{label}: held-out pass@1 gained {fmean(gains):+.3f} on average, "
                f"{min(gains):+.3f} to {max(gains):+.3f} over {len(gains)} seeds."
            )
    return sentences


def chart(panel: Panel, runs: Sequence[RunRecord]) -> dict:
    """A panel as the page draws it: x, and lines with a value or None for each x.

    A line has a label, a colour (its place in the palette) and a kind: "line", "points", "trend" over a
    "faint" one, "wide", "thin", "second" (axis on the right), or "low" and "high" with an area between.
    """
    lines: list[tuple[str, int, str, dict[int, float | None]]] = []
    if len(runs) == 1:
        run = runs[0]
        steps = [batch["step"] for batch in run.metrics]
        for name, kind in zip(panel.spread, ("low", "high"), strict=False):
            lines.append((name.rpartition("_")[2], 0, kind, {b["step"]: b[name] for b in run.metrics}))
        for i, (name, label) in enumerate(panel.lines.items()):
            values = [batch[name] for batch in run.metrics]
            kind = "second" if name in panel.second else "line"
            if (
                panel.stacked and name not in panel.stacked
            ):  # the sum of the others, which would lie over them
                kind = "wide"
            elif len(steps) >= LEAST_TO_SMOOTH and kind == "line" and not panel.stacked:
                lines.append((label, i, "trend", dict(zip(steps, smooth(values), strict=True))))
                kind = "faint"
            lines.append((label, i, kind, dict(zip(steps, values, strict=True))))
        if panel is CLIPPING:
            for label, values in minibatches(run.metrics).items():
                lines.append((label, 5, "thin", dict(zip(steps, values, strict=True))))
        if panel is REWARD:
            ends = [{e["step"]: e["interval_95"][i] for e in run.evaluations} for i in (0, 1)]
            lines += [("95 % from", 1, "low", ends[0]), ("to", 1, "high", ends[1])]
            passed = {e["step"]: e["pass_at_1"] for e in run.evaluations}
            lines.append(("held-out pass@1", 1, "points", passed))
    else:
        name = next(iter(panel.lines))
        for i, (label, same) in enumerate(groups_of(runs).items()):
            lines += band(label, i, "line", [trend(run, name) for run in same])
            if panel is REWARD:
                passed_by_run = [{e["step"]: e["pass_at_1"] for e in run.evaluations} for run in same]
                lines += band(f"{label}: held-out pass@1", i, "points", passed_by_run)
    xs = sorted({step for *_, values in lines for step in values})
    alarms = [a for run in runs[:1] for a in run.alarms if len(runs) == 1 and a.kind in panel.alarms]
    stops = [
        {"first": s, "last": s, "kind": "emergency stop"} for run in runs if (s := run.emergency.get("step"))
    ]
    title = panel.title
    if len(runs) > 1 and len(panel.lines) > 1:
        title += f": {next(iter(panel.lines.values()))}"
    return {
        "title": title,
        "band": panel.band,
        "top": panel.top,
        "x": xs,
        "lines": [
            {"label": label, "colour": colour, "kind": kind, "y": [values.get(x) for x in xs]}
            for label, colour, kind, values in lines
        ],
        "marks": [{"first": a.first, "last": a.last, "kind": a.kind} for a in alarms] + stops,
    }


def trend(run: RunRecord, name: str) -> dict[int, float]:
    """A metric by step, smoothed if there are many."""
    values = [batch[name] for batch in run.metrics]
    shown = smooth(values) if len(values) >= LEAST_TO_SMOOTH else values
    return dict(zip([batch["step"] for batch in run.metrics], shown, strict=True))


def band(label: str, colour: int, kind: str, runs: Sequence[dict[int, float]]) -> list[tuple]:
    """The mean of some runs at each step, and the lowest and the highest value if there are several runs."""
    steps = sorted({step for run in runs for step in run})
    at = {step: [run[step] for run in runs if step in run] for step in steps}
    mean = (label, colour, kind, {step: fmean(values) for step, values in at.items()})
    if len(runs) == 1:
        return [mean]
    return [
        ("lowest", colour, "low", {step: min(values) for step, values in at.items()}),
        ("highest", colour, "high", {step: max(values) for step, values in at.items()}),
        mean,
    ]
