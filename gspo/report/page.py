"""report.html: one file with the verdicts, curves and texts of one run or several; it needs no network."""

import dataclasses
import html
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo.report.charts import Group, charts, differences
from gspo.report.run_record import RunRecord, when
from gspo.report.verdict import LEARNED, SAME, UNKNOWN, told_alarms, verdict
from gspo.training.whole_folders import write_whole

HERE = Path(__file__).parent
# Held-out problems, and pairs of samples, in a page; they are shared among its runs.
MOST_TEXTS = 40
TEXT_CHARACTERS = 2000
# Control characters but for line ends and tabs, and those that change the direction of writing.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def write_page(
    runs: Sequence[RunRecord], path: Path, groups: Sequence[Group] | None = None, head: str = ""
) -> None:
    """Write the page.

    groups: of several runs, those that are one line. head: HTML above the curves, in the place of the runs'
    verdicts, which then follow the curves.

    Raises:
        CannotSave: the file cannot be written.
    """
    names = [run.name for run in runs]
    texts = [texts_of(run, max(4, MOST_TEXTS // len(runs))) for run in runs]
    if len(runs) > 1:
        differing = table([("", *names), *((name, *values) for name, values in differences(runs).items())])
        texts = [differing, *map(folded, [f"Texts of {name}" for name in names], texts)]
    verdicts = list(map(verdict_of, runs))
    if head:
        texts = [folded("Verdicts of the runs", *verdicts), *texts]
        verdicts = [tag("div", head, kind="card")]
    files = ("uplot/uPlot.min.css", "uplot/uPlot.iife.min.js", "page.css", "page.js")
    parts = {file: (HERE / file).read_text(encoding="utf-8") for file in files}
    data = json.dumps([dataclasses.asdict(chart) for chart in charts(runs, groups)])
    parts |= {
        "charts": data.replace("<", "\\u003c"),  # "</script" would end the script element
        "title": text(", ".join(names)),
        "verdicts": "".join(verdicts),
        "texts": "".join(texts),
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    # In one pass, since a part may hold what looks like a placeholder.
    write_whole(path, re.sub("{{(.*?)}}", lambda placeholder: parts[placeholder[1]], template))


def text(value: Any) -> str:
    """The value as HTML that shows it as it is: markup as text, controls visible, and not too long."""
    whole = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = html.escape(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", whole[:TEXT_CHARACTERS]))
    left = len(whole) - TEXT_CHARACTERS
    return f"{shown} ... ({left} more characters)" if left > 0 else shown


def figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "not judged"


def tag(name: str, *inner: str, kind: str = "") -> str:
    """An element of a class with HTML in it."""
    return f'<{name} class="{kind}">{"".join(inner)}</{name}>'


def folded(title: str, *inner: str) -> str:
    return tag("details", tag("summary", text(title)), *inner)


def table(rows: Sequence[Sequence]) -> str:
    lines = [tag("tr", *(tag("td", text(cell)) for cell in row)) for row in rows]
    return tag("div", tag("table", *lines), kind="table")


def section(title: str, note: str, parts: Sequence[str]) -> str:
    """Nothing if there are no parts."""
    return "".join([tag("h2", title), tag("p", note, kind="faint"), *parts]) if parts else ""


def verdict_of(run: RunRecord) -> str:
    """The verdict, what is damaged, and the configuration."""
    headline, *others = verdict(run)
    colour = "good" if headline.startswith(LEARNED) else "bad"
    kind = "headline" if headline.startswith((SAME, UNKNOWN)) else f"headline {colour}"
    config = dict(run.config)
    environment = dict(config.pop("environment", {}))
    command = shlex.join(map(str, environment.pop("command_line", [])))
    rows = [("command", command), *environment.items(), *config.items()]
    parts = [tag("h1", text(run.name)), tag("p", text(headline), kind=kind)]
    parts += [tag("p", text(sentence)) for sentence in others]
    parts += [tag("p", text(f"Damaged: {what}."), kind="bad") for what in run.damage]
    return tag("div", *parts, folded("Command, commit, hardware, configuration", table(rows)), kind="card")


def texts_of(run: RunRecord, most: int) -> str:
    """Alarms, held-out problems, and pairs of samples; at most `most` problems and as many pairs."""
    alarms = [tag("p", text(f"{a.kind} ({a.when}): {a.message}")) for a in told_alarms(run)]
    return section("Alarms", "", alarms) + held_out_texts(run, most) + sample_texts(run, most)


def held_out_texts(run: RunRecord, most: int) -> str:
    """Held-out problems with their first and last responses, those whose mean reward changed most first."""
    by_problem: dict[str, list[dict]] = {}
    for line in run.eval_samples:
        by_problem.setdefault(str(line.get("problem")), []).append(line)
    rewards = {evaluation["step"]: evaluation["reward_by_problem"] for evaluation in run.evaluations}

    def earned(line: dict) -> float:
        """The problem's mean reward over all its responses, of which the line has the first ones."""
        of_problems, problem = rewards.get(line["step"], []), int(line["problem"])
        return of_problems[problem] if problem in range(len(of_problems)) else 0.0

    ordered = sorted(by_problem.values(), key=lambda lines: -abs(earned(lines[-1]) - earned(lines[0])))
    problems = []
    for lines in ordered[:most]:
        ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
        title = (
            f"Problem {lines[0].get('problem')}: mean reward {' → '.join(figure(earned(e)) for e in ends)}"
        )
        sides = [(when(e["step"]), e.get("responses"), e.get("rewards")) for e in ends]
        problems.append(question(title, lines[0], sides))
    held_out = len(run.evaluations[0]["pass_by_problem"]) if run.evaluations else len(ordered)
    note = f"{len(problems)} of {held_out} problems, those whose mean reward changed most first."
    return section("Held-out problems before and after", note, problems)


def sample_texts(run: RunRecord, most: int) -> str:
    """The best and the worst response of a group, from rollout batches that are spread over the run."""
    by_step: dict[int, list[dict]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    pairs = []
    for samples in list(by_step.values())[:: math.ceil(len(by_step) / most) or 1]:
        sides = [(str(s.get("kind")), [s.get("response")], [s.get("reward")]) for s in samples]
        pairs.append(question(f"Rollout batch {samples[0]['step']}", samples[0], sides))
    note = f"From {len(pairs)} of the {len(by_step)} rollout batches on record."
    return section("Best and worst responses of groups in training", note, pairs)


def question(title: str, line: dict, sides: Sequence[tuple[str, Any, Any]]) -> str:
    """A prompt with responses side by side. sides: for each a heading, some responses, and their rewards."""
    columns = []
    for heading, responses, rewards in sides:
        shown = [tag("p", text(heading))]
        for response, reward in zip(responses or [], rewards or [], strict=False):
            kind = "good" if (reward or 0) > 0 else "bad"
            shown += [tag("b", f"reward: {figure(reward)}", kind=kind), tag("pre", text(response))]
        columns.append(tag("div", *shown))
    answer = tag("p", "reference answer: ", text(line.get("answer")), kind="faint")
    if cut := line.get("cut_characters"):
        answer += tag("p", f"The run has not kept {cut} further characters of these texts.", kind="faint")
    return folded(title, tag("pre", text(line.get("prompt"))), answer, tag("div", *columns, kind="pair"))
