"""What a run shows of itself while it trains: the live line, a line per evaluation, and the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from gspo.live_line import LiveLine
from gspo.printing import duration
from gspo.training.config import GSPOConfig


class TimeLeft:
    """Estimates how long the rest of a run takes, from what this process has done of it.

    Work is counted in queries. The later half of the rollout batches counts: the first one, which warms
    things up, is forgotten after the second, and responses that become longer are noticed. Evaluations and
    saves are timed apart, by kind, and the later half of their durations counts as well.
    """

    def __init__(self) -> None:
        self.durations: dict[str, list[float]] = {}
        self._started, self._apart, self._depth = time.monotonic(), 0.0, 0
        self._marks: list[tuple[float, float]] = []

    @contextmanager
    def apart(self, kind: str) -> Iterator[None]:
        """Time something that is not a rollout batch, such as an evaluation."""
        started = time.monotonic()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            seconds = time.monotonic() - started
            self.durations.setdefault(kind, []).append(seconds)
            if not self._depth:
                self._apart += seconds

    def mark(self, work: float) -> None:
        """Note how many queries are done; first of all those that were done when this process began."""
        self._marks.append((time.monotonic() - self._started - self._apart, work))

    def seconds(self, work: float, others: dict[str, int]) -> float:
        """Seconds of so many queries, and of what else is to come: its number by kind.

        A kind that was not seen yet takes as long as saving a model did.
        """
        earlier = self._marks[(len(self._marks) - 1) // 2]
        busy, done = (now - then for now, then in zip(self._marks[-1], earlier, strict=True))
        unseen = self.durations.get("model", [0.0])
        seconds = work * busy / max(done, 1e-9)
        for kind, number in others.items():
            durations = self.durations.get(kind, unseen)
            seconds += number * fmean(durations[len(durations) // 2 :])
        return seconds


class TrainingLine(LiveLine):
    """The live line of a run.

    num_queries, drawn: queries of the whole run, and those trained on before this process began.
    num_batches: rollout batches of the whole run, at most.
    """

    def __init__(self, config: GSPOConfig, num_queries: int, drawn: int, num_batches: int):
        super().__init__(self._parts, stays=True, total=num_queries, initial=drawn)
        self.config, self.num_batches, self.batches_here = config, num_batches, 0
        self.time = TimeLeft()
        self.time.mark(drawn)
        self.figures: list[str] = []
        self._ends_at, self._ended = 0.0, False

    def __exit__(self, *details: Any) -> None:
        self._ended = True
        super().__exit__(*details)

    def note(self, step: int, metrics: dict, drawn: int, sampled: int) -> None:
        """Show a rollout batch that was trained on.

        drawn, sampled: queries trained on so far, and those sampled besides, whose updates are to come.
        """
        self.n = drawn
        self.batches_here += 1
        phases = [metrics[f"{phase}_s"] for phase in ("generation", "reward", "log_prob", "update")]
        done = drawn + sampled * sum(phases[:3]) / sum(phases)
        self.time.mark(done)
        left = self.total - drawn
        last = step + self._batches_left(step, left)
        others = {
            "evaluation": _due(step, last, self.config.eval_frequency) + 1,
            "checkpoint": _due(step, last, self.config.save_frequency) + 1,
            "model": 1,
        }
        self._ends_at = time.monotonic() + self.time.seconds(self.total - done, others)
        reward = metrics["reward_mean"]
        self.figures = [
            f"reward {reward:.2f}" if abs(reward) < 1000 else f"reward {reward:.2g}",
            f"clip {metrics['clip_fraction']:.2f}",
            f"tied {metrics['zero_variance_groups']:.0%}",
            f"{metrics['response_tokens_mean']:.0f} tokens",
            f"batch {step}",
        ]
        self.update(0)

    def _batches_left(self, step: int, queries_left: int) -> int:
        if self.config.dynamic_sampling == "off":
            return self.num_batches - step
        return round(queries_left * self.batches_here / (self.n - self.initial))

    def _parts(self) -> list[str]:
        done = f"training {self.n / self.total:.0%}"
        if self._ended:
            return [done, f"{duration(self.format_dict['elapsed'])} in all", *self.figures]
        if self.figures:
            return [done, f"{duration(max(0.0, self._ends_at - time.monotonic()))} left", *self.figures]
        return [done]


def _due(step: int, last: int, frequency: int) -> int:
    """How many multiples of the frequency there are from step on, before the last step."""
    return (last - 1) // frequency - (step - 1) // frequency if frequency else 0


def describe_evaluation(evaluation: dict, first: dict) -> str:
    """An evaluation in a line: pass@1, its interval, the mean reward if it is another, the change."""
    low, high = evaluation["interval_95"]
    what, interval, changes = "held-out pass@1", "95 % interval ", ["", ""]
    if evaluation["step"] != first["step"]:
        what, interval = "pass@1", ""
        changes = [f" {evaluation[key] - first[key]:+.3f}" for key in ("pass_at_1", "reward_mean")]
    line = f"step {evaluation['step']}: {what} {evaluation['pass_at_1']:.3f}"
    line += f" ({interval}{low:.3f} to {high:.3f}){changes[0]}"
    if any(e["reward_by_problem"] != e["pass_by_problem"] for e in (evaluation, first)):
        line += f", mean reward {evaluation['reward_mean']:.4g}{changes[1]}"
    return line
