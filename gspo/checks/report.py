"""What validation says: checks with the figure that each one measured, as lines, as JSON and as a picture.

A check that raises has failed. Nothing here decides what is checked.
"""

import json
import math
import traceback
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

NAME_WIDTH = 64


@dataclass(frozen=True)
class Check:
    """One property. measured and expected: texts with figures; fault: where to look if it does not hold.

    passed None: not measured here, and `measured` says why.
    """

    name: str
    passed: bool | None
    measured: str
    expected: str
    fault: str = ""

    def line(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "skip"}[self.passed]
        line = f"  {mark} {self.name:{NAME_WIDTH}} {self.measured}"
        if self.passed is False:
            line += (
                f"\n       expected {self.expected}; measured {self.measured}\n       look at: {self.fault}"
            )
        return line


def at_most(name: str, measured: float, bound: float, what: str, fault: str) -> Check:
    """A check that an error does not exceed a bound. NaN exceeds every bound."""
    return Check(name, bool(measured <= bound), f"{what} {measured:.2g}", f"{what} at most {bound:g}", fault)


def each_at_most(name: str, measured: dict[str, float], bound: float, what: str, fault: str) -> Check:
    """at_most for several things at once: thing to its error."""
    figures = ", ".join(f"{thing} {error:.2g}" for thing, error in measured.items())
    worst = max(measured, key=lambda thing: math.inf if math.isnan(measured[thing]) else measured[thing])
    passed = all(error <= bound for error in measured.values())
    return Check(name, passed, f"{what}: {figures}", f"{what} at most {bound:g}", f"{worst}: {fault}")


def between(name: str, measured: float, low: float, high: float, what: str, fault: str) -> Check:
    expected = f"{what} from {low:g} to {high:g}"
    return Check(name, bool(low <= measured <= high), f"{what} {measured:.4g}", expected, fault)


def exactly(name: str, measured, expected, what: str, fault: str) -> Check:
    texts = [f"{what} {'none' if value == [] else value}" for value in (measured, expected)]
    return Check(name, measured == expected, *texts, fault)


@dataclass
class Part:
    """A part of the validation: its checks, and a table for the reader."""

    title: str
    closing_line: str  # printed if every check holds
    checks: list[Check] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)  # heading to rows of column name to value

    def run(self, checks: Generator[Check]) -> None:
        """Print each check's line when it is known."""
        try:
            for check in checks:
                self.add(check)
        except Exception as error:  # whatever the code under test raises is its failure, not ours
            name, what = checks.__name__.replace("_", " "), f"{type(error).__name__}: {error}"
            self.add(Check(name, False, what, "no exception", _last_line_of(error)))

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(check.line(), flush=True)

    def add_table(self, heading: str, rows: list[dict]) -> None:
        self.tables[heading] = rows
        print(f"\n  {heading}\n{_table(rows)}\n", flush=True)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def close(self) -> "Part":
        """Print the closing line, or what failed instead."""
        measured = [check for check in self.checks if check.passed is not None]
        if self.failed:
            names = "; ".join(check.name for check in self.failed)
            print(f"❌ {self.title}: {len(self.failed)} of {len(measured)} FAILED: {names}\n", flush=True)
        elif measured:
            print(f"{self.closing_line}\n", flush=True)
        else:
            print(f"{self.title}: not measured here\n", flush=True)
        return self


def _last_line_of(error: Exception) -> str:
    """The place of an exception, in the worker process if it came from one."""
    lines = "".join(traceback.format_exception(error.__cause__ or error)).splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith("File ")]
    return " ".join(line.strip() for line in lines[places[-1] :][:2]) if places else "the worker process"


def _table(rows: list[dict]) -> str:
    """Aligned columns, as in Markdown."""
    columns = list(rows[0])
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  | " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(folder: Path, settings: dict, parts: list[Part], seconds: float) -> None:
    """results.json: settings, every check with its figures, the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **settings,
        "passed": not any(part.failed for part in parts),
        "seconds": round(seconds, 1),
        "parts": [asdict(part) for part in parts],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_metrics(folder: Path, runs: Iterable[tuple[str, list[dict]]]) -> None:
    """metrics.jsonl: a line a rollout batch of every run, with the run's name."""
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for name, metrics in runs:
            for step, line in enumerate(metrics, start=1):
                file.write(json.dumps({"run": name, "step": step, **line}) + "\n")


def draw_dynamics(path: Path, runs: dict[str, list[dict]], paper: dict[str, float]) -> None:
    """Reward, clip fraction by minibatch and ratio spread of some runs: name to metrics, a dict a batch.

    paper: algorithm to the clip fraction that the paper reports; the other runs are controls.
    """
    figure, (rewards, clipping, ratios) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for colour, (name, metrics) in zip(pyplot.cm.tab10.colors, runs.items(), strict=False):
        steps = range(1, len(metrics) + 1)
        rewards.plot(steps, [m["reward_mean"] for m in metrics], label=name, color=colour)
        if name not in paper:  # a control, whose ratios say nothing more
            continue
        by_minibatch = zip(*(m["clip_fraction_by_minibatch"] for m in metrics), strict=True)
        means = [sum(fractions) / len(metrics) for fractions in by_minibatch]
        clipping.plot(range(1, len(means) + 1), means, "o-", label=name, color=colour)
        clipping.axhline(paper[name], color=colour, linestyle=":", label=f"{name} in the paper, pooled")
        low, high = ([m[f"importance_ratio_{end}"] for m in metrics] for end in ("min", "max"))
        ratios.fill_between(steps, low, high, color=colour, alpha=0.4, label=name)
    clipping.set_yscale("symlog", linthresh=1e-3)
    clipping.set_ylim(0, 1)
    for axes, title, x, y in (
        (rewards, "Reward", "rollout batch", "mean reward"),
        (clipping, "Clipped tokens", "minibatch", "share of tokens (log scale above 0.001)"),
        (ratios, "Spread of the importance ratios", "rollout batch", "smallest to largest ratio"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
