"""report.html: one file with the verdicts, curves and texts of one run or several; it needs no network."""

import dataclasses
import html
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gspo.report.charts import charts, differences
from gspo.report.run_record import RunRecord
from gspo.report.verdict import LEARNED, SAME, UNKNOWN, verdict
from gspo.training.command_line import escaped
from gspo.training.whole_folders import write_whole

HERE = Path(__file__).parent
# Held-out problems, and pairs of samples, in a page; they are shared among its runs.
MOST_TEXTS = 40
TEXT_CHARACTERS = 3000
NOTE = "Over rollout batches. Point at a chart for its values; drag to zoom, double-click to go back."


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page. Raises CannotSave."""
    names = [run.name for run in runs]
    is_one = len(runs) == 1
    differing = [[name, *values] for name, values in differences(runs).items()]
    texts = [texts_of(run, max(4, MOST_TEXTS // len(runs))) for run in runs]
    body = [
        tag("h1", text(names[0]) if is_one else f"{len(runs)} runs"),
        tag("div", *map(verdict_of, runs), kind="runs"),
        section("Settings that differ", "", [table([["", *names], *differing])] if differing else []),
        section("Curves", NOTE, ['<div class="charts" id="charts"></div>']),
        *(texts if is_one else map(folded, [f"Texts of {name}" for name in names], texts)),
    ]
    data = json.dumps([dataclasses.asdict(chart) for chart in charts(runs)])
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": text(", ".join(names)),
        "UPLOT_STYLE": (HERE / "uplot" / "uPlot.min.css").read_text(encoding="utf-8"),
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "UPLOT": (HERE / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "page.js").read_text(encoding="utf-8"),
        # A text within a script element would end it with "</script".
        "DATA": data.replace("<", "\\u003c"),
        "BODY": "".join(body),  # last: a text in it may look like a placeholder
    }
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    write_whole(path, page)


# ---- elements


def text(value: Any) -> str:
    """The value as HTML that shows it as it is: markup as text, controls visible, and not too long."""
    whole = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = html.escape(escaped(whole[:TEXT_CHARACTERS], "\n\t"))
    left = len(whole) - TEXT_CHARACTERS
    return f"{shown} ... ({left} more characters)" if left > 0 else shown


def figure(value: Any) -> str:
    is_known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4g}" if is_known else "-"


def tag(name: str, *inner: str, kind: str = "") -> str:
    """An element of a class with HTML in it."""
    return f'<{name} class="{kind}">{"".join(inner)}</{name}>'


def folded(title: str, *inner: str) -> str:
    return tag("details", tag("summary", text(title)), *inner)


def table(rows: Iterable[Sequence]) -> str:
    lines = [tag("tr", *(tag("td", text(cell)) for cell in row)) for row in rows]
    return tag("div", tag("table", *lines), kind="table")


def section(title: str, note: str, parts: Sequence[str]) -> str:
    """Nothing if there are no parts."""
    return "".join([tag("h2", title), tag("p", note, kind="faint"), *parts]) if parts else ""


# ---- what a page says of a run


def verdict_of(run: RunRecord) -> str:
    """The verdict, what is damaged, and the configuration."""
    headline, *others = verdict(run)
    colour = "good" if headline.startswith(LEARNED) else "bad"
    kind = "" if headline.startswith((SAME, UNKNOWN)) else colour
    config = dict(run.config)
    environment = dict(config.pop("environment", {}))
    command = shlex.join(map(str, environment.pop("command_line", [])))
    return tag(
        "div",
        tag("b", text(run.name)),
        tag("p", text(headline), kind=f"headline {kind}"),
        *(tag("p", text(sentence)) for sentence in others),
        *(tag("p", text(f"Damaged: {what}."), kind="bad") for what in run.damage),
        folded(
            "Command, commit, hardware, configuration",
            table([("command", command), *environment.items(), *config.items()]),
        ),
        kind="card",
    )


def texts_of(run: RunRecord, most: int) -> str:
    """Alarms, held-out problems and samples; most: problems, and pairs of samples."""
    alarms = [tag("p", text(f"{alarm.kind}, {alarm.when}: {alarm.message}")) for alarm in run.alarms]
    by_problem: dict[str, list[dict]] = {}
    for line in run.eval_samples:
        by_problem.setdefault(str(line.get("problem")), []).append(line)
    problems = sorted(by_problem.values(), key=lambda lines: -abs(earned(lines[-1]) - earned(lines[0])))
    pairs: dict[int, list[dict]] = {}
    for sample in run.samples:
        pairs.setdefault(sample["step"], []).append(sample)
    stride = math.ceil(len(pairs) / most) or 1
    of = f"{min(most, len(problems))} of {len(problems)}, those whose reward changed most first."
    return "".join([
        section("Alarms", "", alarms),
        section("Evidence of the emergency stop", "", [response(each) for each in run.emergency_samples[:8]]),
        section("Held-out problems before and after", of, [problem(lines) for lines in problems[:most]]),
        section(
            "Best and worst responses of groups in training",
            f"Of every rollout batch of {len(pairs)}." if stride == 1 else f"Of every {stride}th rollout batch.",
            [pair(samples) for samples in [*pairs.values()][::stride]],
        ),
    ])  # fmt: skip


def problem(lines: Sequence[dict]) -> str:
    """A held-out problem with its first and its last responses."""
    ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
    rewards = " → ".join(figure(earned(line)) for line in ends)
    title = f"Problem {lines[0].get('problem')}: mean reward {rewards}"
    return folded(title, question(lines[0]), tag("div", *map(evaluated, ends), kind="pair"))


def evaluated(line: dict) -> str:
    when = f"after rollout batch {line['step']}" if line["step"] else "before training"
    responses = zip(line.get("responses", []), line.get("rewards", []), strict=False)
    shown = [response({"response": each, "reward": reward}) for each, reward in responses]
    return tag("div", tag("p", when), *shown)


def earned(line: dict) -> float:
    """Mean reward of the responses to a problem; 0 for one that could not be judged."""
    return fmean([reward or 0.0 for reward in line.get("rewards", [])] or [0.0])


def pair(samples: Sequence[dict]) -> str:
    """The best and the worst response of a group."""
    rewards = " and ".join(figure(sample.get("reward")) for sample in samples)
    title = f"Rollout batch {samples[0]['step']}: rewards {rewards}"
    return folded(title, question(samples[0]), tag("div", *map(response, samples), kind="pair"))


def question(line: dict) -> str:
    answer = tag("p", "reference answer: ", text(line.get("answer")), kind="faint")
    return tag("pre", text(line.get("prompt"))) + answer


def response(sample: dict) -> str:
    reward = sample.get("reward")
    colour = "good" if (reward or 0) > 0 else "bad"
    label = tag("b", "not judged" if reward is None else f"reward {figure(reward)}", kind=colour)
    return tag("div", label, tag("pre", text(sample.get("response"))))
