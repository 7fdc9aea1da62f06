"""Sample responses and reward them, by all processes together."""

import math
import time
from collections.abc import Callable, Sequence

from gspo.policy.rollout import Rollout
from gspo.training.alarms import EmergencyStop
from gspo.training.processes import Processes
from gspo.training.rollout_batch import Sample

# Makes the rollouts of some problems; the second argument is the number of the first of them.
Generate = Callable[[Sequence, int], list[Rollout]]
# Rewards responses: (problems, responses) -> rewards, None for one that cannot be judged.
RewardFn = Callable[[list, list[str]], Sequence[float | None]]


def sample_and_reward(
    problems: Sequence, group_size: int, generate: Generate, reward_fn: RewardFn, processes: Processes
) -> tuple[list[Sample], dict]:
    """Samples of each problem, groups contiguous; how long it took; and the sums in reward_fn.metrics.

    Raises:
        EmergencyStop: a log-probability or a reward is not finite.
    """
    share = processes.contiguous_share(len(problems))
    own = [problems[i] for i in share]
    asked = [problem for problem in own for _ in range(group_size)]
    started = time.perf_counter()
    rollouts = generate(own, share.start) if own else []
    generated = time.perf_counter()
    rewards = reward_fn(asked, [rollout.text for rollout in rollouts]) if own else []
    metrics = {"generation_s": generated - started, "reward_s": time.perf_counter() - generated}
    own_sums = getattr(reward_fn, "metrics", {}) if own else {}
    for sums in processes.gather([own_sums]):
        for name, value in sums.items():
            metrics[name] = metrics.get(name, 0) + value
    gathered = processes.gather(list(zip(rollouts, rewards, strict=True)))
    samples = []
    for i, (rollout, reward) in enumerate(gathered):
        if not all(map(math.isfinite, rollout.log_probs)):
            raise EmergencyStop("the policy's log-probabilities are not finite")
        if reward is not None and not math.isfinite(reward):
            raise EmergencyStop("the reward function returned a value that is not finite")
        samples.append(Sample(problems[i // group_size], rollout, reward))
    return samples, metrics
