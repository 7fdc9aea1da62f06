"""Trackers (--log_to): what wandb, TensorBoard and trackio have in common. They read the record along.

A tracker is a sink of the record. It gets the figures as single numbers under train/ and eval/, the best and
worst responses and the held-out texts at each evaluation, the settings, and a summary. One that raises or
hangs is reported once, and the run goes on without it.
"""

import importlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gspo.printing import escaped, say
from gspo.training.config import TRACKERS
from gspo.training.record import read_lines
from gspo.training.sampling import standing
from gspo.training.whole_folders import write_whole

# Seconds that a tracker may take before the run goes on without it.
START_S, CALL_S, FINISH_S = 120, 30, 120
# The record's streams of figures, and the prefixes of their names in a tracker.
PREFIXES = {"metrics": "train", "eval": "eval"}
# Lists of the record, and the names of their entries in a tracker. Those with an entry per held-out problem
# are left out, since they would be as many charts: the table of texts has their rewards.
LISTS = {"interval_95": ("interval_95_low", "interval_95_high")}
MINIBATCHES = "_by_minibatch"  # the end of the names of lists with an entry per update
# The figures of an evaluation that a summary has.
SUMMARISED = ("pass_at_1", "reward_mean")


def open_trackers(names: tuple[str, ...], folder: Path, settings: dict, step: int) -> list["Tracker"]:
    """The trackers of these names (TRACKERS), for a run that begins or goes on after rollout batch `step`."""
    classes = []
    for name in names:
        module = importlib.import_module(f"gspo.training.{name}_tracker")
        classes.append(getattr(module, TRACKERS[name]))
    return [tracker(folder, settings, step) for tracker in classes]


class Tracker(ABC):
    """A sink of the record. Subclasses say how their package takes what it gets.

    folder: the run's folder. settings: its resolved configuration. step: rollout batches trained on so far;
    what was written after it by a process that was killed is written again.
    """

    name: str

    def __init__(self, folder: Path, settings: dict, step: int):
        self.folder = folder
        self.works = True
        self._samples: list[dict] = []  # since the last evaluation
        self._held_out: list[dict] = []
        self._attempt(lambda: self.start(settings, step), START_S)

    @abstractmethod
    def start(self, settings: dict, step: int) -> None:
        """Begin, or go on if the folder says that there was a beginning."""

    @abstractmethod
    def log(self, step: int, figures: dict[str, float]) -> None:
        """Take figures by name."""

    @abstractmethod
    def log_texts(self, step: int, samples: list[dict], held_out: list[dict]) -> None:
        """Take lines of samples.jsonl and of eval_samples.jsonl; each list may be empty."""

    @abstractmethod
    def summarise(self, step: int, figures: dict[str, float]) -> None:
        """Take the summary: first, last and best values of the evaluations so far."""

    @abstractmethod
    def finish(self) -> None: ...

    def write(self, stream: str, step: int, values: dict) -> None:
        line = {"step": step, **values}
        if not self.works:
            return
        if stream == "samples":
            self._samples.append(line)
        elif stream == "eval_samples":
            self._held_out.append(line)
        else:
            self._attempt(lambda: self._write_figures(stream, step, values), CALL_S)

    def _write_figures(self, stream: str, step: int, values: dict) -> None:
        self.log(step, single_figures(PREFIXES[stream], values))
        if stream == "eval":
            self._flush_texts(step)
            self.summarise(step, summary(read_lines(self.folder, "eval")))

    def _flush_texts(self, step: int) -> None:
        samples, held_out = self._samples, self._held_out
        self._samples, self._held_out = [], []
        self.log_texts(step, samples, held_out)

    def once(self, file_name: str, text: str) -> str:
        """Return the text that a file of the run's folder has; write the given one into it if it is new."""
        path = self.folder / file_name
        if not path.exists():
            write_whole(path, text)
        return path.read_text(encoding="utf-8")

    def close(self) -> None:
        if self.works and self._samples:
            self._attempt(lambda: self._flush_texts(self._samples[-1]["step"]), CALL_S)
        if self.works:
            self._attempt(self.finish, FINISH_S)

    def _attempt(self, call: Callable[[], Any], seconds: float) -> None:
        """Do call() in a thread of its own, since it may raise or hang."""
        errors: list[str] = []

        def attempt() -> None:
            try:
                call()
            except BaseException as error:  # wandb ends threads of its own with SystemExit
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            errors.append(f"no answer within {seconds:.0f} s")
        if errors:
            self.works = False
            self._samples, self._held_out = [], []
            error = escaped(errors[0])
            say(f"{self.name}: {error}; the run goes on without it, all is in its folder", sys.stderr)


def single_figures(prefix: str, values: dict) -> dict[str, float]:
    """The figures of a line of the record by their names in a tracker, lists taken apart."""
    figures = {}
    for name, value in values.items():
        if not isinstance(value, list):
            figures[f"{prefix}/{name}"] = value
            continue
        names: Sequence[str] = LISTS.get(name, ())
        if name.endswith(MINIBATCHES):
            names = [f"{name.removesuffix(MINIBATCHES)}_minibatch_{i}" for i in range(len(value))]
        figures |= {f"{prefix}/{one}": number for one, number in zip(names, value, strict=False)}
    return figures


def summary(evaluations: list[dict]) -> dict[str, float]:
    """The first, last and best values of the evaluations, as eval/pass_at_1_best, and the best's step."""
    best = max(evaluations, key=standing)  # the first of equally good ones, as best_model
    chosen = {"first": evaluations[0], "last": evaluations[-1], "best": best}
    figures = {f"eval/{name}_{kind}": chosen[kind][name] for name in SUMMARISED for kind in chosen}
    return figures | {"eval/best_step": best["step"]}


def tables(samples: list[dict], held_out: list[dict]) -> dict[str, tuple[list[str], list[list]]]:
    """The texts as tables, name to columns and rows; one without rows is left out."""
    made = {"samples": sample_rows(samples), "held_out": held_out_rows(held_out)}
    return {name: (columns, rows) for name, (columns, rows) in made.items() if rows}


def sample_rows(samples: list[dict]) -> tuple[list[str], list[list]]:
    """Lines of samples.jsonl as a table: columns and rows."""
    columns = ["step", "kind", "prompt", "answer", "response", "reward", "advantage", "tokens", "finished"]
    lines = [line | {"answer": str(line.get("answer"))} for line in samples]  # a column has one type
    return columns, [[plain(line.get(name)) for name in columns] for line in lines]


def held_out_rows(held_out: list[dict]) -> tuple[list[str], list[list]]:
    """Lines of eval_samples.jsonl as a table with a row per response: columns and rows."""
    columns = ["step", "problem", "prompt", "answer", "response", "reward", "passed"]
    rows = []
    for line in held_out:
        beginning = [line["step"], line["problem"], line["prompt"], line["answer"]]
        for answered in zip(line["responses"], line["rewards"], line["passed"], strict=True):
            rows.append([plain(value) for value in (*beginning, *answered)])
    return columns, rows


def plain(value: Any) -> Any:
    """A cell of a table: chat messages and the like as text."""
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
