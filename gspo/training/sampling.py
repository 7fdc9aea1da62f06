"""Sample responses and reward them, by all processes together; what an evaluation makes of them."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gspo.policy.rollout import Rollout, encode_prompt
from gspo.training.alarms import MEND_REWARD, EmergencyStop
from gspo.training.config import GSPOConfig
from gspo.training.intervals import wilson_interval
from gspo.training.processes import Processes
from gspo.training.rollout_batch import Sample, mean_parts

# Makes the rollouts of some problems; the second argument is the number of the first of them.
Generate = Callable[[Sequence, int], list[Rollout]]
# Rewards responses: (problems, responses) -> for each a number, a dict of named parts whose sum is the
# reward, or None if it cannot be judged.
RewardFn = Callable[[list, list[str]], Sequence[float | dict[str, float] | None]]
# What eval_samples.jsonl keeps of an evaluation: problems, responses to each, and characters of each text.
EVAL_PROBLEMS_KEPT, EVAL_RESPONSES_KEPT, EVAL_CHARACTERS_KEPT = 100, 4, 4000
# The responses of a group have the streams 0, 1, ... of a seed (gspo/policy/rollout.py).
SHUFFLE_STREAM = 2**32 - 1
# A sum of parts that should reach the pass threshold may miss it by a rounding error.
THRESHOLD_TOLERANCE = 1e-9


def encode_problem(tokenizer: Any, problem: Any, config: GSPOConfig) -> list[int]:
    """The token ids of a problem's prompt, as the model sees it."""
    template_kwargs = json.loads(config.chat_template_kwargs)
    return encode_prompt(tokenizer, problem.prompt, config.system_prompt, template_kwargs)


def sample_and_reward(
    problems: Sequence,
    group_size: int,
    generate: Generate,
    reward_fn: RewardFn,
    processes: Processes,
    pass_threshold: float = 1.0,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[list[Sample], dict]:
    """Samples of each problem, groups contiguous; how long it took; and the sums in reward_fn.metrics.

    Args:
        pass_threshold: the reward from which on a response has passed.
        prepare: gives new weights to an engine that has its own. Collective; its time counts as sampling.

    Raises:
        EmergencyStop: a log-probability or a reward is not finite.
        EngineError: the engine cannot sample.
        ValueError: reward_fn does not return one reward for each response.
    """
    share = processes.contiguous_share(len(problems))
    own = [problems[i] for i in share]
    asked = [problem for problem in own for _ in range(group_size)]
    started = time.perf_counter()
    prepare()
    rollouts = processes.each(lambda: generate(own, share.start) if own else [])
    generated = time.perf_counter()

    def own_rewards() -> Sequence:
        rewards = reward_fn(asked, [rollout.text for rollout in rollouts]) if own else []
        if len(rewards) != len(rollouts):
            raise ValueError(
                f"reward_fn returned {len(rewards)} rewards for {len(rollouts)} responses: one for each"
            )
        return rewards

    rewards = processes.each(own_rewards)
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
        sample = Sample(problems[i // group_size], rollout, None)
        if reward is not None:
            # Whatever kind of numbers they are: checkpoints hold plain data.
            if isinstance(reward, dict):
                sample.parts = {str(name): float(part) for name, part in reward.items()}
            sample.reward = float(sum(reward.values()) if isinstance(reward, dict) else reward)
            if not math.isfinite(sample.reward):
                raise EmergencyStop(
                    "the reward function returned a value that is not finite; None: not judged"
                )
            sample.passed = sample.reward >= pass_threshold - THRESHOLD_TOLERANCE
        samples.append(sample)
    return samples, metrics


def shuffle_rewards(samples: Sequence[Sample], group_size: int, seed: int) -> None:
    """Permute the rewards of each group at random among its responses, with what belongs to them: a control.

    The rewards of a group stay what they are, so that all figures about rewards stay.

    Args:
        samples: groups contiguous.
        seed: of the permutations; the responses' own random streams may have the same.
    """
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SHUFFLE_STREAM,)))
    for start in range(0, len(samples), group_size):
        group = samples[start : start + group_size]
        earned = [(sample.reward, sample.passed, sample.parts) for sample in group]
        for sample, place in zip(group, generator.permutation(len(group)), strict=True):
            sample.reward, sample.passed, sample.parts = earned[place]


def evaluation_metrics(samples: Sequence[Sample], group_size: int) -> dict:
    """What an evaluation found, from group_size samples of each problem.

    Returns:
        pass_at_1: share of responses that passed, and interval_95 of it (Wilson's, over problems);
        reward_mean, and reward_part/NAME for named parts; response_tokens_mean; pass_by_problem and
        reward_by_problem: the share and the mean reward of each problem, for paired comparisons. A response
        that could not be judged counts as not passed, with reward 0.

    Raises:
        EmergencyStop: none could be judged. Nothing is on record then, and a resumed run evaluates again.
    """
    if all(sample.reward is None for sample in samples):
        raise EmergencyStop("no response to a held-out problem could be judged", advice=MEND_REWARD)
    passed = np.array([sample.passed for sample in samples])  # (Q * G,)
    rewards = np.array([sample.reward or 0.0 for sample in samples])
    # The mean is taken over all responses at once. A mean of the problems' means could differ from it in the
    # last bit, and evaluations that are equally good must compare as equal.
    pass_at_1 = float(passed.mean())
    return {
        "pass_at_1": pass_at_1,
        "interval_95": list(wilson_interval(pass_at_1, len(samples) // group_size)),
        "reward_mean": float(rewards.mean()),
        **mean_parts(samples),
        "response_tokens_mean": float(np.mean([sample.num_tokens for sample in samples])),
        "pass_by_problem": passed.reshape(-1, group_size).mean(1).tolist(),
        "reward_by_problem": rewards.reshape(-1, group_size).mean(1).tolist(),
    }


def evaluation_texts(samples: Sequence[Sample], group_size: int) -> list[dict]:
    """The lines of eval_samples.jsonl, from group_size samples of each problem: what a person reads.

    Of the first EVAL_PROBLEMS_KEPT problems the first EVAL_RESPONSES_KEPT responses. Texts are cut after
    EVAL_CHARACTERS_KEPT characters; cut_characters says how many were left out of a line.
    """
    lines = []
    for number, start in enumerate(range(0, len(samples), group_size)[:EVAL_PROBLEMS_KEPT]):
        group = samples[start : start + min(group_size, EVAL_RESPONSES_KEPT)]
        prompt, answer = group[0].problem.prompt, getattr(group[0].problem, "answer", None)
        if not isinstance(prompt, str):  # chat messages
            prompt = json.dumps(prompt, ensure_ascii=False, default=str)
        given = [prompt, "" if answer is None else str(answer), *(sample.rollout.text for sample in group)]
        kept = [text[:EVAL_CHARACTERS_KEPT] for text in given]
        lines.append(
            {
                "problem": number,
                "prompt": kept[0],
                "answer": None if answer is None else kept[1],
                "responses": kept[2:],
                "rewards": [sample.reward for sample in group],
                "passed": [sample.passed for sample in group],
                "cut_characters": sum(map(len, given)) - sum(map(len, kept)),
            }
        )
    return lines


def standing(evaluation: dict) -> tuple[float, float]:
    """The figures by which evaluations are compared: pass@1, then the mean reward.

    The mean reward decides where pass@1 is the same, as with a dense reward that is never exactly 1.
    """
    return evaluation["pass_at_1"], evaluation["reward_mean"]
