"""A group without a signal changes nothing, and an update without a gradient is not made."""

from copy import deepcopy

import pytest
import torch

from gspo.policy.rollout import Rollout, Sampling, TransformersEngine
from gspo.training.rollout_batch import RolloutBatch, Sample
from support.records import without_seconds
from support.sorting import problems, shared_prefix, trainer


def tied(asked, responses):
    return [0.25] * len(asked)


def state_of(t):
    """All that an optimizer update changes: weights, moments and schedule."""
    optimizer, schedule = deepcopy(t.optimizer.state_dict()), t.schedule.state_dict()
    return [p.detach().clone() for p in t.model.parameters()], optimizer, schedule


def assert_same_state(one, other):
    assert all(map(torch.equal, one[0], other[0]))
    assert one[1]["param_groups"] == other[1]["param_groups"] and one[2] == other[2]
    for ours, theirs in zip(one[1]["state"].values(), other[1]["state"].values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("frequency", [1, 2])
def test_a_tied_batch_leaves_weights_moments_and_schedule_as_they_are(frequency):
    t = trainer(warmup_steps=20, weight_decay=0.1, update_frequency=frequency)
    t.train_step(problems(4))
    before = state_of(t)
    assert before[1]["state"] and before[2]["last_epoch"] > 0
    t.reward_fn = tied
    metrics = t.train_step(problems(4, seed=1))
    assert_same_state(before, state_of(t))
    assert (metrics["grad_norm"], metrics["loss"], metrics["clip_fraction_by_minibatch"]) == (0, 0, [])
    assert (metrics["updates_without_signal"], metrics["zero_variance_groups"]) == (4, 1)
    assert metrics["learning_rate"] == t.schedule.get_last_lr()[0]
    # The very next batch with a signal trains as if there had been none in between.
    t.reward_fn = shared_prefix
    other = trainer(warmup_steps=20, weight_decay=0.1, update_frequency=frequency)
    other.train_step(problems(4))
    other.step = t.step  # the sampling's random streams go by the step
    assert_metrics_equal(t.train_step(problems(4, seed=2)), other.train_step(problems(4, seed=2)))
    assert_same_state(state_of(t), state_of(other))


def assert_metrics_equal(one, other):
    (one,), (other,) = without_seconds([one]), without_seconds([other])
    assert {name: one[name] for name in one if one[name] != other[name]} == {}


def test_with_a_kl_term_a_tied_group_has_a_gradient():
    t = trainer(kl_coef=0.1)
    t.train_step(problems(4))
    before = state_of(t)[0]
    t.reward_fn = tied
    metrics = t.train_step(problems(4, seed=1))
    assert metrics["grad_norm"] > 0 == metrics["updates_without_signal"]
    assert not all(map(torch.equal, before, t.model.parameters()))


class OneByOne(TransformersEngine):
    """Samples each prompt by itself, with a seed of its own: it has the same responses in any batch."""

    def generate(self, prompts, group_size, sampling) -> list[Rollout]:
        own = [
            Sampling(sampling.max_new_tokens, sampling.temperature, sampling.max_length, seed=sum(prompt))
            for prompt in prompts
        ]
        generate = super().generate
        return [r for p, s in zip(prompts, own, strict=True) for r in generate([p], group_size, s)]


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token", "grpo", "sapo"])
def test_a_run_whose_every_second_group_is_tied_equals_the_run_without_those_groups(algorithm):
    with_signal, without = problems(12), problems(12, seed=1)
    tied_ids = {problem.id for problem in without}

    def rewards(asked, responses):
        found = shared_prefix(asked, responses)
        return [0.5 if p.id in tied_ids else r for p, r in zip(asked, found, strict=True)]

    def run(batch_size, mini_batch_size, batches):
        t = trainer(
            reward_fn=rewards, algorithm=algorithm, batch_size=batch_size, mini_batch_size=mini_batch_size,
            group_size=8, warmup_steps=5, weight_decay=0.1,
        )  # fmt: skip
        t.engine = OneByOne(t.model, t.tokenizer)
        return t, [t.train_step(batch) for batch in batches]

    places = range(0, 12, 4)
    pairs = [p for pair in zip(with_signal, without, strict=True) for p in pair]
    mixed, all_metrics = run(8, 2, [pairs[2 * i : 2 * i + 8] for i in places])
    alone, expected = run(4, 1, [with_signal[i : i + 4] for i in places])
    assert_same_state(state_of(mixed), state_of(alone))
    assert all(metrics["zero_variance_groups"] == 0 for metrics in expected)
    same = (
        "clip_fraction_by_minibatch", "clip_fraction_eligible", "clip_fraction_left", "clip_fraction_right",
        "ratio_spread", "importance_ratio_mean", "importance_ratio_std", "importance_ratio_min",
        "importance_ratio_max", "grad_norm", "learning_rate", "updates_without_signal",
    )  # fmt: skip
    for metrics, without_tied in zip(all_metrics, expected, strict=True):
        assert [metrics[name] for name in same] == [without_tied[name] for name in same]
        assert metrics["zero_variance_groups"] == 0.5 and metrics["queries"] == 8
        assert metrics["loss"] == pytest.approx(without_tied["loss"] / 2, rel=1e-12)  # of twice the responses


@pytest.mark.parametrize(
    "has_signal, planned, dealt",
    [
        ([1, 1, 1, 1], 4, [[0], [1], [2], [3]]),
        ([0, 1, 0, 1], 4, [[1], [3]]),
        ([0, 1, 0, 1, 1, 1, 0, 1], 4, [[1, 3], [4], [5], [7]]),
        ([1, 1, 1, 0], 2, [[0, 1], [2]]),
        ([1, 1, 1], 1, [[0, 1, 2]]),
        ([0, 0], 2, []),
    ],
)
def test_groups_with_a_signal_are_dealt_evenly(has_signal, planned, dealt):
    rollout = Rollout([1], [2], [-0.5], "", True)
    samples = [
        Sample(g, rollout, 0.0, has_signal=bool(s)) for g, s in enumerate(has_signal) for _ in range(2)
    ]
    minibatches = RolloutBatch(samples, 2, planned, 0).minibatches()
    assert [[s.problem for s in minibatch[::2]] for minibatch in minibatches] == dealt
    assert all(
        len(minibatch) == 2 * len(groups) for minibatch, groups in zip(minibatches, dealt, strict=True)
    )


def test_an_update_in_which_everything_is_clipped_is_not_made():
    """Between two others: it leaves all as it is, and the first stays the one that cannot clip."""
    t = trainer(group_size=8, learning_rate=1e-5)
    t.train_step(problems(4))
    batch = t.collect(problems(4, seed=1), 1)
    minibatches = batch.minibatches()
    for sample in minibatches[1]:
        if sample.advantage:
            sample.old_log_probs = sample.old_log_probs - (0.1 if sample.advantage > 0 else -0.1)
    states = []
    step, update = t.schedule.last_epoch, t._update_minibatch

    def noting(*args):
        update(*args)
        states.append(state_of(t))

    t._update_minibatch = noting
    metrics = t.update(batch)
    assert_same_state(states[0], states[1])
    assert metrics["clip_fraction_by_minibatch"][1] == 1 and batch.updates[1]["grad_norm"] == 0
    assert metrics["updates_without_signal"] == 1 and t.schedule.last_epoch == step + len(minibatches) - 1


def test_a_response_at_its_groups_mean_cannot_clip():
    def reward(asked, responses):
        return [(0.0, 0.5, 1.0)[i % 3] for i in range(len(asked))]

    t = trainer(group_size=3, reward_fn=reward, kl_coef=0.1)  # without it, the forward pass leaves them out
    batch = t.collect(problems(4), 1)
    metrics = t.update(batch)
    can_clip = [sample.ratio_spread is not None for sample in batch.samples]
    assert can_clip == [False] * 3 + [True, False, True] * 3  # the first update sees pi_old itself
    tokens = [sample.num_tokens for sample in batch.samples]
    expected = sum(n for n, can in zip(tokens, can_clip, strict=True) if can) / sum(tokens)
    assert metrics["eligible_fraction"] == pytest.approx(expected)


def test_noise_in_the_first_update_is_not_clipping_of_what_can_clip():
    """After a resume with other micro-batches, log pi_old comes from other kernels, and noise may clip."""
    t = trainer(group_size=8, learning_rate=1e-12)
    batch = t.collect(problems(4), 0)  # the first batch has all log-probabilities, as it measures their noise
    first = batch.minibatches()[0]
    for sample in first[: len(first) // 2]:
        sample.old_log_probs = sample.old_log_probs - (0.1 if sample.advantage > 0 else -0.1)
    metrics = t.update(batch)
    assert metrics["clip_fraction_by_minibatch"][0] > 0.2 and metrics["clip_fraction"] > 0.05
    names = ("clip_fraction_eligible", "clip_fraction_left", "clip_fraction_right")
    assert [metrics[name] for name in names] == [0, 0, 0]
    tokens = {id(s): s.num_tokens for s in batch.samples if s.advantage}
    can_clip = sum(tokens.values()) - sum(tokens.get(id(s), 0) for s in first)
    assert metrics["eligible_fraction"] == pytest.approx(can_clip / sum(s.num_tokens for s in batch.samples))


def test_a_batch_without_a_signal_measures_no_noise():
    t = trainer(reward_fn=tied)
    assert "null_clip_fraction" not in t.train_step(problems(4))
