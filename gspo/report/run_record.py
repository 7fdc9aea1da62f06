"""A run's folder as one object, whatever state the run is in: finished, going, stopped, killed or damaged."""

import fcntl
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path

from gspo.training.alarms import held_out_fall, warnings_of
from gspo.training.find_run import settings_of
from gspo.training.record import readable_lines

# The rules of the alarms read the beginning of a run and its last rollout batches. They get so many of each:
# with all of them, the time would grow with the square of a run's length.
BEGINNING, RECENT = 100, 400
STREAMS = ("metrics", "eval", "samples", "eval_samples")


@dataclass(frozen=True)
class Alarm:
    """A warning and the rollout batches from the first to the last that raised it without a break."""

    kind: str
    first: int
    last: int
    message: str

    @property
    def when(self) -> str:
        return batches(self.first, self.last)


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says; empty where it says nothing.

    config: config.json. metrics, evaluations, samples, eval_samples: the lines of the files, by step.
    emergency: emergency/metrics.json, with its "step" and "reason", if the run stopped there and has not gone
        on since. emergency_samples: the responses of that rollout batch.
    damage: a line for each file that could not be read to its end.
    going: True if a process is at work on the run.
    """

    name: str
    config: dict
    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    eval_samples: list[dict]
    emergency: dict
    emergency_samples: list[dict]
    damage: list[str]
    going: bool

    @property
    def step(self) -> int:
        """Rollout batches trained on."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        """True if all queries of all epochs were drawn, and the held-out problems evaluated after them."""
        drawn = sum(batch["queries"] for batch in self.metrics)
        data = self.config.get("data")
        problems = data.get("train_problems", math.inf) if isinstance(data, dict) else math.inf
        return (
            drawn >= self.setting("num_epochs", 1) * problems
            and bool(self.evaluations)
            and self.evaluations[-1]["step"] == self.step
        )

    @property
    def clips_per_token(self) -> bool:
        """True for GRPO, whose ratios and clip fractions are those of single tokens."""
        return self.config.get("algorithm") == "grpo"

    def setting(self, name: str, default: float) -> float:
        """A number of the configuration, or the default if it is missing or not a number."""
        value = self.config.get(name)
        return value if isinstance(value, int | float) else default

    @cached_property
    def alarms(self) -> list[Alarm]:
        """The warnings of the run, in the order of their first rollout batches."""
        found: list[Alarm] = []
        for lines, rule in ((self.metrics, self._raised), (self.evaluations, _fallen)):
            earlier = -1
            for i, line in enumerate(lines):
                recent = lines[max(BEGINNING, i + 1 - RECENT) : i + 1]
                for kind, message in rule([*lines[: min(BEGINNING, i + 1)], *recent]).items():
                    begun = next((a for a in found if a.kind == kind and a.last == earlier), None)
                    if begun:
                        found.remove(begun)
                    first = begun.first if begun else line["step"]
                    found.append(Alarm(kind, first, line["step"], message))
                earlier = line["step"]
        return sorted(found, key=lambda alarm: alarm.first)

    def _raised(self, metrics: list[dict]) -> dict[str, str]:
        return warnings_of(metrics, self.clips_per_token)


def _fallen(evaluations: list[dict]) -> dict[str, str]:
    fall = held_out_fall(evaluations)
    return {"held-out": fall} if fall else {}


def read_run(folder: Path, going: bool | None = None) -> RunRecord:
    """Read a run's folder. Only a folder that cannot be listed is an error; what is missing stays empty.

    going: whether a process is at work on the run, if that is known; the lock on the folder tells otherwise.

    Raises:
        OSError: there is no such folder.
    """
    os.listdir(folder)
    read = {stream: readable_lines(folder, stream) for stream in STREAMS}
    lines = {stream: sorted(found, key=itemgetter("step")) for stream, (found, _) in read.items()}
    damage = [f"{what}; what follows is left out" for _, what in read.values() if what]
    config = settings_of(folder)
    if config is None:
        damage.append("config.json is missing or damaged: settings are unknown")
    emergency = _emergency(folder / "emergency" / "metrics.json")
    metrics = list({batch["step"]: batch for batch in lines["metrics"]}.values())
    is_stopped = emergency.get("step", 0) > (metrics[-1]["step"] if metrics else 0)
    evaluations = lines["eval"]
    lengths = [{len(e["pass_by_problem"]), len(e["reward_by_problem"])} for e in evaluations]
    return RunRecord(
        name=Path(os.path.abspath(folder)).name,
        config=config or {},
        metrics=metrics,
        evaluations=[e for e, found in zip(evaluations, lengths, strict=True) if found == lengths[0] != {0}],
        samples=lines["samples"],
        eval_samples=lines["eval_samples"],
        emergency=emergency if is_stopped else {},
        emergency_samples=_objects(folder / "emergency" / "samples.jsonl") if is_stopped else [],
        damage=damage,
        going=_is_locked(folder) if going is None else going,
    )


def batches(first: int, last: int) -> str:
    """Some rollout batches in words."""
    return f"rollout batch {first}" if first == last else f"rollout batches {first} to {last}"


def _objects(path: Path) -> list[dict]:
    """The JSON objects of a file with one a line, up to the first damaged line; none if there is no file."""
    found: list[dict] = []
    try:
        for line in path.read_bytes().splitlines():
            found.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError):
        return found
    return found


def _emergency(path: Path) -> dict:
    """What emergency/metrics.json says, if it says when and why."""
    try:
        figures = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return figures if isinstance(figures.get("step"), int) and "reason" in figures else {}


def _is_locked(folder: Path) -> bool:
    """True if a run holds the lock of its folder (gspo.training.run_folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
