"""What a run of a comparison came to: the figures that are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from statistics import fmean

from gspo.comparison.cells import Cell, is_complete
from gspo.report.charts import SECONDS
from gspo.report.run_record import RunRecord


@dataclass(frozen=True)
class Outcome:
    """A run and what it came to.

    end: the rollout batch at which the curves of its setting end. A run that died before keeps its last
    evaluation until then.
    """

    cell: Cell
    run: RunRecord
    end: int

    @property
    def died(self) -> str:
        """Why the run was stopped for good; nothing if it is finished."""
        return str(self.run.emergency.get("reason", "")) if self.run.emergency else ""

    def final(self, figure: str = "pass_by_problem") -> list[float]:
        """The last evaluation's figures by problem."""
        return self.run.evaluations[-1][figure]

    @property
    def held_out(self) -> str | None:
        """A digest of the held-out problems; None for a run that was made before there was one."""
        return self.run.config.get("data", {}).get("held_out")

    def before(self) -> float:
        return self.run.evaluations[0]["pass_at_1"]

    def best(self) -> list[float]:
        """pass@1 by problem of the best evaluation. The more there are, the higher it is by chance."""
        return max(self.run.evaluations, key=itemgetter("pass_at_1"))["pass_by_problem"]

    def area(self) -> list[float]:
        """The mean of pass@1 over the rollout batches, by problem: the area under its curve, per batch."""
        points = [(e["step"], e["pass_by_problem"]) for e in self.run.evaluations]
        if points[-1][0] < self.end:
            points.append((self.end, points[-1][1]))
        if len(points) == 1:  # no rollout batch was trained on
            return points[0][1]
        problems = range(len(points[0][1]))
        total = points[-1][0] - points[0][0]
        return [
            sum((b - a) * (low[i] + high[i]) / 2 for (a, low), (b, high) in pairwise(points)) / total
            for i in problems
        ]

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over the rollout batches that have it."""
        values = [batch[metric] for batch in self.run.metrics if metric in batch]
        return fmean(values) if values else None

    @property
    def responses(self) -> int:
        """Responses that training has sampled."""
        return int(sum(batch["queries"] for batch in self.run.metrics) * self.run.setting("group_size"))

    @property
    def seconds(self) -> float:
        """Seconds of training, without evaluations."""
        return sum(batch.get(part, 0.0) for batch in self.run.metrics for part in SECONDS)


def _planned(run: RunRecord) -> int:
    """The rollout batches that a run would have made, as far as its configuration tells."""
    problems = run.config.get("data", {}).get("train_problems", 0)
    batches = run.setting("num_epochs") * -(-problems // max(1, run.setting("batch_size")))
    return max(run.step, int(batches))


def outcomes_of(cells: Sequence[Cell], read: Callable[[Cell], RunRecord | None]) -> list[Outcome]:
    """The outcomes of the seeds of one setting, of the runs that are complete and have an evaluation."""
    records = [(cell, read(cell)) for cell in cells]
    runs = [(cell, run) for cell, run in records if run and run.evaluations and is_complete(cell, run)]
    finished = [run.step for _, run in runs if not run.emergency]
    end = max(finished or [_planned(run) for _, run in runs], default=0)
    return [Outcome(cell, run, max(end, run.step)) for cell, run in runs]
