"""A run's folder as one object, whatever state the run is in: finished, going, stopped, killed or damaged."""

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path

from gspo.printing import escaped
from gspo.training.alarms import held_out_fall, warnings_of
from gspo.training.find_run import settings_of
from gspo.training.record import FIELDS, readable_lines

EMERGENCY_STOP = "emergency stop"
# The rules of the alarms read the beginning of a run and its last rollout batches. They get so many of each:
# with all of them, the time would grow with the square of a run's length.
BEGINNING, RECENT = 100, 400


@dataclass(frozen=True)
class Alarm:
    """A warning or a stop, and the first and the last rollout batch of those in a row that raised it."""

    kind: str
    first: int
    last: int
    message: str

    @property
    def when(self) -> str:
        is_one = self.first == self.last
        return f"rollout batch {self.first}" if is_one else f"rollout batches {self.first} to {self.last}"


@dataclass(frozen=True)
class RunRecord:
    """All that is read from a run's folder. A file that is missing gives an empty field.

    The lines of each file are sorted by step.
    """

    name: str
    config: dict
    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    eval_samples: list[dict]
    emergency: dict  # emergency/metrics.json, if the run has not gone on since
    damage: list[str]  # what is wrong with each file that could not be read to its end
    going: bool  # a process is at work on the run

    @property
    def step(self) -> int:
        """Rollout batches trained on."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        """True if all queries of all epochs were drawn, and the held-out problems evaluated after them."""
        data = self.config.get("data")
        problems = data.get("train_problems", math.inf) if isinstance(data, dict) else math.inf
        drawn = sum(batch["queries"] for batch in self.metrics)
        is_evaluated = any(evaluation["step"] == self.step for evaluation in self.evaluations)
        return is_evaluated and drawn >= self.setting("num_epochs") * problems

    @property
    def clips_per_token(self) -> bool:
        """As in warnings_of(); runs before config.json said so had GRPO alone."""
        return bool(self.config.get("clips_per_token", self.config.get("algorithm") == "grpo"))

    def setting(self, name: str) -> float:
        """A number of the configuration; 0 if it is missing or not a number."""
        value = self.config.get(name)
        return value if isinstance(value, int | float) else 0

    def now(self, name: str) -> str:
        """A number of the configuration in brackets, as advice has it; nothing if it is missing."""
        return f" (now {self.setting(name):g})" if self.setting(name) else ""

    @cached_property
    def alarms(self) -> list[Alarm]:
        """The warnings of the run, in the order of their first rollout batches, and the emergency stop."""
        rule = partial(warnings_of, clips_per_token=self.clips_per_token)
        found = _raised(self.metrics, rule)
        found += _raised(self.evaluations, lambda evaluations: {"held-out": held_out_fall(evaluations)})
        found.sort(key=lambda alarm: alarm.first)
        if self.emergency:
            step = self.emergency["step"]
            found.append(Alarm(EMERGENCY_STOP, step, step, str(self.emergency["reason"])))
        return found


def _raised(lines: list[dict], rule: Callable[[list[dict]], Mapping[str, str | None]]) -> list[Alarm]:
    """The alarms that a rule on the lines so far raises; those in a row are one."""
    found: dict[tuple[str, int], Alarm] = {}
    begun: dict[str, int] = {}
    for i, line in enumerate(lines):
        recent = lines[max(BEGINNING, i + 1 - RECENT) : i + 1]
        raised = {kind: says for kind, says in rule(lines[: min(BEGINNING, i + 1)] + recent).items() if says}
        begun = {kind: begun.get(kind, line["step"]) for kind in raised}
        for kind, first in begun.items():
            found[kind, first] = Alarm(kind, first, line["step"], raised[kind])
    return list(found.values())


def read_run(folder: Path, going: bool | None = None) -> RunRecord:
    """Read a run's folder.

    going: whether a process is at work on the run, if that is known; the lock on the folder tells otherwise.

    Raises:
        OSError, ValueError: the folder cannot be read, or holds nothing of a run.
    """
    names = ["config.json", *(f"{stream}.jsonl" for stream in FIELDS)]
    if not set(names) & set(os.listdir(folder)):
        raise ValueError(f"{folder} holds no run (none of {', '.join(names)}); name a folder in gspo_outputs")
    read = {stream: readable_lines(folder, stream) for stream in FIELDS}
    lines = {stream: sorted(found, key=itemgetter("step")) for stream, (found, _) in read.items()}
    damage = [f"{what}; what follows is left out" for _, what in read.values() if what]
    config = settings_of(folder)
    if config is None:
        damage.append("config.json is missing or damaged: settings are unknown")
    metrics = list({batch["step"]: batch for batch in lines["metrics"]}.values())
    sizes = [(len(e["pass_by_problem"]), len(e["reward_by_problem"])) for e in lines["eval"]]
    evaluations = [e for e, size in zip(lines["eval"], sizes, strict=True) if size == sizes[0]]
    if len(evaluations) < len(sizes):
        damage.append("eval.jsonl has evaluations of other problems, which are left out")
    run = RunRecord(
        name=escaped(Path(os.path.abspath(folder)).name.encode(errors="replace").decode()),
        config=config or {},
        metrics=metrics,
        evaluations=evaluations,
        samples=lines["samples"],
        eval_samples=lines["eval_samples"],
        emergency=_emergency(folder, after=metrics[-1]["step"] if metrics else 0),
        damage=damage,
        going=_is_locked(folder) if going is None else going,
    )
    # A run that was continued after its stop may not have reached the next rollout batch, or have none left.
    return replace(run, emergency={}) if run.going or run.finished else run


def _emergency(folder: Path, after: int) -> dict:
    """Return the content of emergency/metrics.json, or {} if it is missing, damaged or of an earlier step."""
    try:
        figures = json.loads((folder / "emergency" / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(figures, dict) and isinstance(figures.get("step"), int) and "reason" in figures
    return figures if is_whole and figures["step"] > after else {}


def _is_locked(folder: Path) -> bool:
    """True if a run holds the lock of its folder (gspo.training.run_folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def when(step: int) -> str:
    """The time of an evaluation in words."""
    return f"after rollout batch {step}" if step else "before training"
