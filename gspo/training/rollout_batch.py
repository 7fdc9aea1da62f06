"""A rollout batch: responses, what they earned, and how far its updates have come.

Shapes: Q queries, G group size, B = Q * G responses (groups contiguous).
"""

import math
from dataclasses import asdict, dataclass, field

import torch

from gspo.policy.rollout import Rollout


@dataclass
class RolloutBatch:
    """What one rollout batch is trained on, from its sampling to its last update."""

    problems: list  # (Q,)
    rollouts: list[Rollout]  # (B,)
    rewards: torch.Tensor  # (B,); NaN: not judged
    advantages: torch.Tensor  # (B,)
    teaches: torch.Tensor  # (B,) bool: has an advantage, or a KL term to pull it; the others cost nothing
    old_log_probs: dict[int, torch.Tensor] = field(default_factory=dict)  # row to (|y|,), of those that teach
    reference_log_probs: dict[int, torch.Tensor] = field(default_factory=dict)  # under the starting model
    metrics: dict = field(default_factory=dict)  # what is known before the updates
    # What each optimizer update so far has reported, and each response's log-probabilities as it saw them.
    updates: list[dict] = field(default_factory=list)
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict:
        """Everything but the problems, as plain data and tensors."""
        state = {name: value for name, value in vars(self).items() if name != "problems"}
        return state | {"rollouts": [asdict(rollout) for rollout in self.rollouts]}

    @classmethod
    def from_state_dict(cls, state: dict, problems: list) -> "RolloutBatch":
        return cls(problems, **(state | {"rollouts": [Rollout(**values) for values in state["rollouts"]]}))

    def records(self) -> list[dict]:
        """Each response with what is known of it, for a person to read."""
        size = len(self.rollouts) // len(self.problems)
        return [self._record(row, size) for row in range(len(self.rollouts))]

    def best_and_worst(self) -> list[dict]:
        """The best and the worst response of the group whose rewards differ most."""
        size = len(self.rollouts) // len(self.problems)
        groups = self.advantages.view(-1, size)  # (Q, G)
        group = int((groups.amax(1) - groups.amin(1)).argmax())
        rows = {"best": int(groups[group].argmax()), "worst": int(groups[group].argmin())}
        return [{"kind": kind} | self._record(group * size + row, size) for kind, row in rows.items()]

    def _record(self, row: int, group_size: int) -> dict:
        problem, rollout, reward = (
            self.problems[row // group_size],
            self.rollouts[row],
            self.rewards[row].item(),
        )
        return {
            **{name: getattr(problem, name, None) for name in ("id", "prompt", "answer")},
            "response": rollout.text,
            "reward": None if math.isnan(reward) else reward,
            "advantage": self.advantages[row].item(),
            "tokens": len(rollout.response_ids),
            "finished": rollout.finished,
        }
