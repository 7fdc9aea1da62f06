"""Draw queries until enough groups of the rollout batch have a signal (arXiv 2503.14476, section 3.2)."""

import math
from collections.abc import Callable, Sequence

from gspo.training.rollout_batch import Sample

# A rollout batch draws at most this many times batch_size queries.
MAX_DRAWN = 8
# Weight of the newest rollout batch in the running share of groups with a signal.
SIGNAL_SHARE_WEIGHT = 0.3

# Rewarded samples of some problems, groups contiguous, and the sums of what they took; the second argument is
# the number of problems drawn before them.
SampleFn = Callable[[Sequence, int], tuple[list[Sample], dict]]


def keeps(group: Sequence[Sample], mode: str) -> bool:
    """True if a group is trained on.

    mode: "reward" keeps a group whose rewards differ, "pass" one in which some responses pass and some do
        not, "off" every group. Responses that could not be judged do not count.
    """
    judged = [sample for sample in group if sample.reward is not None]
    if mode == "reward":
        return len({sample.reward for sample in judged}) > 1
    if mode == "pass":
        return len({sample.passed for sample in judged}) > 1
    return True


class QueryDraw:
    """Draws queries for rollout batches; it remembers how many groups had a signal of late.

    mode: off, reward or pass (keeps).
    batch_size: queries per rollout batch. With dynamic sampling, those whose groups are kept.
    """

    def __init__(self, mode: str, batch_size: int, group_size: int):
        self.mode, self.batch_size, self.group_size = mode, batch_size, group_size
        self.signal_share = 1.0

    def draw(self, problems: Sequence, sample: SampleFn) -> tuple[list[Sample], dict]:
        """Samples of all these problems, or with dynamic sampling of as many from the front as it takes.

        With dynamic sampling, at most MAX_DRAWN times batch_size are drawn. Each round draws what the share
        of groups with a signal of late suggests. So the last round may bring more than batch_size of them,
        and all of them are trained on.
        """
        if self.mode != "off":
            problems = problems[: MAX_DRAWN * self.batch_size]
        samples: list[Sample] = []
        metrics: dict[str, float] = {}
        drawn = kept = 0
        while drawn < len(problems) and (drawn == 0 or kept < self.batch_size):
            count = len(problems)
            if self.mode != "off":
                count = math.ceil((self.batch_size - kept) / max(self.signal_share, 1 / MAX_DRAWN))
            chunk = problems[drawn : drawn + count]
            more, sums = sample(chunk, drawn)
            samples += more
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0) + value
            drawn += len(chunk)
            groups = [more[i : i + self.group_size] for i in range(0, len(more), self.group_size)]
            kept += sum(keeps(group, self.mode) for group in groups)
        return samples, metrics

    def note(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Take the groups of a rollout batch into the running share, once nothing can fail any more.

        An error after the draw must leave the share as it was, so that a resumed run draws the same queries.
        """
        share = sum(keeps(group, self.mode) for group in groups) / len(groups)
        self.signal_share += SIGNAL_SHARE_WEIGHT * (share - self.signal_share)
