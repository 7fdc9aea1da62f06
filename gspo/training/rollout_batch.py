"""A rollout batch: its responses, what they earned, and how far its updates have come."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from gspo.policy.expert_routing import RowExperts
from gspo.policy.rollout import Rollout
from gspo.training.alarms import repetition, unreadable_characters
from gspo.training.hardware import peak_memory_gb
from gspo.training.loss_metrics import pool_metrics, without_sums

# The log-probabilities of a response, now and before, (|y|,), to how far it has moved (Algorithm.movement).
Movement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Metrics of a reward's named parts begin with this.
PART_PREFIX = "reward_part/"


@dataclass
class Sample:
    """One response of a rollout batch, with all that is known of it.

    problem: any object with a string .prompt.
    reward: None if the response could not be judged.
    passed: True if it reached the pass threshold.
    parts: the named parts of the reward, if it has such; their sum is the reward.
    advantage: A_i of the response within its group; 0 if its group is tied or it was not judged.
    has_signal: False if no gradient comes from it, so that nothing more needs to be computed.
    masked: True if it has no part in the gradient because sampler and trainer differ too much on it. It stays
        in the forward passes, whose shapes must not change, and in the denominator.
    old_log_probs: (|y|,) float32 on the CPU, log pi_old of the response's tokens; None until it is computed.
        With --pi_old sampler, these are the sampler's own.
    experts: of a mixture of experts, those of the response and of its prompt under pi_old; None if they are
        neither measured nor replayed, or if the update is to choose them.
    reference_log_probs: (|y|,) the same under the starting model; None without a KL penalty.
    ratio_spread: |s - 1| in its update, in units of the mean clip range (with clipping per token: the median
        over its tokens of what the range bounds); None if it has no advantage, or if the policy still was
        pi_old.

    Example, of a response of three tokens in a group of four with rewards 1, 0, 0, 0:

        Sample(problem, Rollout([5, 9, 2], [7, 7, 1], [-0.1, -0.7, -0.2], "34", True), reward=1.0,
               advantage=1.5, has_signal=True, old_log_probs=tensor([-0.1, -0.7, -0.2]))
    """

    problem: Any
    rollout: Rollout
    reward: float | None
    advantage: float = 0.0
    has_signal: bool = False
    old_log_probs: torch.Tensor | None = None
    experts: RowExperts | None = None
    reference_log_probs: torch.Tensor | None = None
    ratio_spread: float | None = None
    passed: bool = False
    masked: bool = False
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.response_ids)

    @property
    def trained_advantage(self) -> float:
        """The advantage that the loss sees."""
        return 0.0 if self.masked else self.advantage

    @property
    def sampled_log_probs(self) -> torch.Tensor:
        """(|y|,) float32: the sampler's log-probabilities, under the distribution that it sampled from."""
        return torch.tensor(self.rollout.log_probs)

    def sampler_gap(self, log_probs: torch.Tensor, pi_old: str) -> float:
        """Mean distance, in nats per token, between the log-probabilities of sampler and trainer.

        log_probs: (|y|,) under the present policy. It is compared if pi_old is "sampler", or not known yet;
            else the trainer's pi_old is.
        """
        is_trainers = pi_old == "trainer" and self.old_log_probs is not None
        trainers = self.old_log_probs if is_trainers else log_probs
        return (self.sampled_log_probs - trainers).abs().mean().item()

    def note_ratio(self, log_probs: torch.Tensor, mean_range: float, movement: Movement) -> None:
        """Set ratio_spread from the present log-probabilities (|y|,), if the sample has an advantage.

        mean_range: the mean of the left and the right clip range. movement: that of the Algorithm.
        """
        if not self.trained_advantage:
            return
        assert self.old_log_probs is not None
        moved = movement(log_probs, self.old_log_probs).abs()  # (1,) or (|y|,)
        self.ratio_spread = float(np.median(moved.numpy())) / mean_range

    def record(self) -> dict:
        """The sample as plain data, for a person to read."""
        return {
            **{name: getattr(self.problem, name, None) for name in ("id", "prompt", "answer")},
            "response": self.rollout.text,
            "reward": self.reward,
            **({"reward_parts": self.parts} if self.parts else {}),
            "advantage": self.advantage,
            "tokens": self.num_tokens,
            "finished": self.rollout.finished,
            **({"masked": True} if self.masked else {}),
        }


def lacks_pi_old(samples: Sequence[Sample]) -> bool:
    """True if an update is to compute log pi_old for some of the samples."""
    return any(sample.has_signal and sample.old_log_probs is None for sample in samples)


def mean_parts(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of each named part of the reward, as reward_part/NAME, over the responses that have it."""
    names = sorted({name for sample in samples for name in sample.parts})
    values = {name: [sample.parts[name] for sample in samples if name in sample.parts] for name in names}
    return {f"{PART_PREFIX}{name}": float(np.mean(values[name])) for name in names}


@dataclass
class RolloutBatch:
    """What one rollout batch is trained on, from its sampling to its last update.

    samples: (Q * G,) groups contiguous.
    planned_updates: optimizer updates to make, if there are as many groups with a signal.
    updates_before: optimizer updates made before it was sampled.
    metrics: what is known before the updates.
    updates: the metrics of each optimizer update so far.
    """

    samples: list[Sample]
    group_size: int
    planned_updates: int
    updates_before: int
    metrics: dict = field(default_factory=dict)
    updates: list[dict] = field(default_factory=list)

    def groups(self) -> list[list[Sample]]:
        size = self.group_size
        return [self.samples[i : i + size] for i in range(0, len(self.samples), size)]

    @property
    def num_queries(self) -> int:
        return len(self.samples) // self.group_size

    def minibatches(self) -> list[list[Sample]]:
        """The samples of each optimizer update: the groups that have a signal, in order and dealt evenly.

        An update for which no group is left is not made.
        """
        groups = [group for group in self.groups() if any(sample.has_signal for sample in group)]
        dealt = np.array_split(np.arange(len(groups)), self.planned_updates)
        return [[sample for i in part for sample in groups[i]] for part in dealt if len(part)]

    def statistics(self) -> dict[str, float]:
        """What the rewards and the text of the batch are like (record.GLOSSARY)."""
        judged = [s.reward for s in self.samples if s.reward is not None]
        rewards = torch.tensor(judged or [0.0], dtype=torch.float64)
        tied = [all(sample.advantage == 0 for sample in group) for group in self.groups()]
        passes_by_group = [{s.passed for s in group if s.reward is not None} for group in self.groups()]
        rollouts = [sample.rollout for sample in self.samples]
        return {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "queries": self.num_queries,
            "zero_variance_groups": float(np.mean(tied)),
            "groups_all_right": float(np.mean([passes == {True} for passes in passes_by_group])),
            "groups_all_wrong": float(np.mean([passes == {False} for passes in passes_by_group])),
            "unjudged_responses": len(self.samples) - len(judged),
            "response_tokens_mean": float(np.mean([sample.num_tokens for sample in self.samples])),
            "entropy": -float(np.mean([x for rollout in rollouts for x in rollout.log_probs])),
            "truncated_fraction": float(np.mean([not rollout.finished for rollout in rollouts])),
            "repetition": float(np.mean([repetition(rollout.response_ids) for rollout in rollouts])),
            "unreadable_characters": float(np.mean([unreadable_characters(r.text) for r in rollouts])),
            **mean_parts(self.samples),
        }

    def final_metrics(self) -> dict:
        """The metrics of the batch after its last update (record.GLOSSARY)."""
        num_tokens = sum(sample.num_tokens for sample in self.samples)
        spreads = [sample.ratio_spread for sample in self.samples if sample.ratio_spread is not None]
        grad_norms = [update["grad_norm"] for update in self.updates]
        by_minibatch = {
            f"{name}_by_minibatch": [update[name] for update in self.updates]
            for name in ("clip_fraction", "routing_changed")
            if name == "clip_fraction" or any(name in update for update in self.updates)
        }
        metrics = {
            **self.metrics,
            **without_sums(pool_metrics(self.updates, len(self.samples), num_tokens)),
            **by_minibatch,
            "ratio_spread": float(np.median(spreads)) if spreads else 0.0,
            "updates_without_signal": self.planned_updates - sum(norm > 0 for norm in grad_norms),
            "grad_norm": float(np.mean(grad_norms)) if grad_norms else 0.0,
            "update_s": sum(update["seconds"] for update in self.updates),
        }
        if self.updates:
            metrics["learning_rate"] = self.updates[-1]["learning_rate"]
        seconds = sum(metrics[name] for name in ("generation_s", "reward_s", "log_prob_s", "update_s"))
        return {**metrics, "tokens_per_s": num_tokens / seconds, "peak_memory_gb": peak_memory_gb()}

    def state_dict(self) -> dict:
        """Everything but the problems, as plain data and tensors."""
        samples = []
        for sample in self.samples:
            state = {name: value for name, value in vars(sample).items() if name != "problem"}
            samples.append(state | {"rollout": asdict(sample.rollout)})
        return {**vars(self), "samples": samples}

    @classmethod
    def from_state_dict(cls, state: dict, problems: Sequence) -> "RolloutBatch":
        """The batch again; problems: (Q,) those it was sampled for."""
        samples = []
        for i, values in enumerate(state["samples"]):
            problem = problems[i // state["group_size"]]
            samples.append(Sample(problem, **(values | {"rollout": Rollout(**values["rollout"])})))
        return cls(**(state | {"samples": samples}))

    def records(self) -> list[dict]:
        """Each response with what is known of it, for a person to read."""
        return [sample.record() for sample in self.samples]

    def best_and_worst(self) -> list[dict]:
        """The best and the worst response of the group whose advantages differ most."""

        def advantage(sample: Sample) -> float:
            return sample.advantage

        def spread(group: list[Sample]) -> float:
            return max(map(advantage, group)) - min(map(advantage, group))

        group = max(self.groups(), key=spread)
        chosen = {"best": max(group, key=advantage), "worst": min(group, key=advantage)}
        return [{"kind": kind} | sample.record() for kind, sample in chosen.items()]
