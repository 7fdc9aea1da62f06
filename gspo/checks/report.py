"""The results of validation: checks with the figures that they measured, as lines, as JSON and as a picture.

A check that raises has failed. Nothing here decides what is checked.
"""

import json
import math
import traceback
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

NAME_WIDTH = 64


@dataclass(frozen=True)
class Check:
    """One property. measured and expected: texts with figures; fault: where to look if it does not hold.

    passed is None where the property was not measured, and `measured` says why.
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
            line += f"\n       expected {self.expected}; measured {self.measured}"
            line += f"\n       look at: {self.fault}"
        return line


Checks = Generator[Check, None, None]  # each check is yielded as soon as it is known


def at_most(name: str, measured: float, bound: float, what: str, fault: str) -> Check:
    """A check that an error does not exceed a bound. NaN exceeds every bound."""
    return Check(name, bool(measured <= bound), f"{what} {measured:.2g}", f"{what} at most {bound:g}", fault)


def each_at_most(name: str, measured: dict[str, float], bound: float, what: str, fault: str) -> Check:
    """A check like at_most for several things at once, from thing to its error."""
    figures = ", ".join(f"{thing} {error:.2g}" for thing, error in measured.items())
    comparable = {thing: math.inf if math.isnan(error) else error for thing, error in measured.items()}
    worst = max(comparable, key=comparable.__getitem__)
    passed = all(error <= bound for error in measured.values())
    return Check(name, passed, f"{what}: {figures}", f"{what} at most {bound:g}", f"{worst}: {fault}")


def between(name: str, measured: float, low: float, high: float, what: str, fault: str) -> Check:
    expected = f"{what} from {low:g} to {high:g}"
    return Check(name, bool(low <= measured <= high), f"{what} {measured:.4g}", expected, fault)


def exactly(name: str, measured: object, expected: object, what: str, fault: str) -> Check:
    """A check that two values are equal. An empty list reads as "none"."""
    shown, wanted = ("none" if value == [] else value for value in (measured, expected))
    return Check(name, measured == expected, f"{what} {shown}", f"{what} {wanted}", fault)


@dataclass
class Part:
    """A part of the validation: its checks, and a table for the reader."""

    title: str
    closing_line: str  # printed if every check holds
    checks: list[Check] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)  # heading to rows of column name to value

    def run(self, checks: Checks) -> None:
        """Print each check's line as soon as it is known. An exception is a check that has failed."""
        try:
            for check in checks:
                self.add(check)
        except Exception as error:  # whatever the code under test raises is its failure, not ours
            name = getattr(checks, "__name__", "checks").replace("_", " ")
            what = f"{type(error).__name__}: {error}"
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
    """The place where an exception was raised, in the worker process if it came from one."""
    lines = "".join(traceback.format_exception(error.__cause__ or error)).splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith("File ")]
    if not places:
        return "the worker process"
    place, source = lines[places[-1] : places[-1] + 2]
    return f"{place.strip()} {source.strip()}"


def _table(rows: list[dict]) -> str:
    """Aligned columns, as in Markdown."""
    columns = list(rows[0])
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  | " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(folder: Path, settings: dict, parts: list[Part], seconds: float) -> None:
    """Write results.json: settings, every check with its figures, the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **settings,
        "passed": not any(part.failed for part in parts),
        "seconds": round(seconds, 1),
        "parts": [asdict(part) for part in parts],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_metrics(folder: Path, runs: Iterable[tuple[str, list[dict]]]) -> None:
    """Write metrics.jsonl: one line for each rollout batch of each run, with the run's name."""
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for name, metrics in runs:
            for step, line in enumerate(metrics, start=1):
                file.write(json.dumps({"run": name, "step": step, **line}) + "\n")


def mean_by_minibatch(metrics: Sequence[dict]) -> list[float]:
    """The clip fraction of each update of a rollout batch, averaged over the rollout batches that made it."""
    means = []
    for place in range(max(len(m["clip_fraction_by_minibatch"]) for m in metrics)):
        made = [m["clip_fraction_by_minibatch"][place : place + 1] for m in metrics]
        means.append(fmean(fraction for fractions in made for fraction in fractions))
    return means


def draw_dynamics(path: Path, runs: dict[str, list[dict]], paper: dict[str, float]) -> None:
    """Draw reward, clip fraction by minibatch and spread of ratios of some runs.

    runs: name to metrics, one dict per rollout batch. paper: algorithm to the clip fraction that the paper
    reports; a run with another name is a control, whose clipping and ratios are not drawn.
    """
    # Imported here, because the worker processes draw nothing and should not wait for it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    rewards, clipping, ratios = figure.subplots(1, 3)
    for i, (name, metrics) in enumerate(runs.items()):
        colour = f"C{i}"  # of the default colours
        steps = range(1, len(metrics) + 1)
        rewards.plot(steps, [m["reward_mean"] for m in metrics], label=name, color=colour)
        if name not in paper:
            continue
        means = mean_by_minibatch(metrics)
        clipping.plot(range(1, len(means) + 1), means, "o-", label=name, color=colour)
        clipping.axhline(paper[name], color=colour, linestyle=":", label=f"{name} in the paper, pooled")
        low = [m["importance_ratio_min"] for m in metrics]
        high = [m["importance_ratio_max"] for m in metrics]
        ratios.fill_between(steps, low, high, color=colour, alpha=0.4, label=name)
    clipping.set_yscale("symlog", linthresh=1e-3)
    clipping.set_ylim(0, 1)
    _finish(rewards, "Reward", "rollout batch", "mean reward")
    _finish(clipping, "Clipped tokens", "minibatch", "share of tokens (log scale above 0.001)")
    _finish(ratios, "Spread of the importance ratios", "rollout batch", "smallest to largest ratio")
    figure.savefig(path, dpi=110)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.has_data():
        axes.legend()
