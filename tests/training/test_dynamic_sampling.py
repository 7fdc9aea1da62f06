"""Dynamic sampling: how many queries are drawn, which groups are trained on, and what a run of it covers."""

import numpy as np
import pytest
import torch

from gspo.training.dynamic_sampling import MAX_DRAWN, QueryDraw, keeps
from gspo.training.rollout_batch import Sample
from gspo.training.stopping import Interrupted
from gspo.training.training_run import TrainingRun
from support.metrics import EVALUATION
from support.records import lines_of
from support.sorting import problems, shared_prefix, trainer

# A group of two for each letter: a signal, all right, all wrong.
REWARDS = {"s": (1.0, 0.0), "r": (1.0, 1.0), "w": (0.0, 0.0)}


def group(*rewards):
    return [Sample(None, None, reward, passed=reward == 1.0) for reward in rewards]


@pytest.mark.parametrize(
    "rewards, by_reward, by_pass",
    [
        ((1.0, 0.0), True, True),
        ((1.0, 1.0), False, False),
        ((0.5, 0.2), True, False),  # a dense reward, and nobody passes
        ((1.0, 0.9), True, True),
        ((None, 1.0), False, False),  # one judged response has nothing to be compared with
        ((None, 1.0, 0.0), True, True),
        ((None, None), False, False),
    ],
)
def test_which_groups_are_kept(rewards, by_reward, by_pass):
    assert keeps(group(*rewards), "reward") is by_reward
    assert keeps(group(*rewards), "pass") is by_pass
    assert keeps(group(*rewards), "off") is True


def drawn_from(letters, draw):
    """The rounds in which a draw takes the problems."""
    rounds = []

    def sample(chunk, drawn):
        assert drawn == sum(map(len, rounds))
        rounds.append("".join(chunk))
        return [x for letter in chunk for x in group(*REWARDS[letter])], {"generation_s": 0.5}

    samples, metrics = draw.draw(letters, sample)
    draw.note([samples[i : i + 2] for i in range(0, len(samples), 2)])
    assert len(samples) == 2 * sum(map(len, rounds)) and metrics == {"generation_s": 0.5 * len(rounds)}
    return rounds


def test_a_draw_ends_with_batch_size_groups_that_have_a_signal():
    draw = QueryDraw("reward", 4, 2)
    assert drawn_from("srwsssssss", draw) == ["srws", "ss"]  # a share of 1 at first
    assert draw.signal_share == pytest.approx(1 + 0.3 * (4 / 6 - 1))
    draw.signal_share = 0.5
    assert drawn_from("wwsswwsrsswwwww", draw) == ["wwsswwsr", "ss"]  # 4 / 0.5, and then 1 / 0.5
    draw.signal_share = 0.5
    assert drawn_from("ssssssss", draw) == ["ssssssss"]  # more than asked for; all of them are trained on
    draw.signal_share = 0.01
    assert drawn_from("w" * 100, draw) == ["w" * 4 * MAX_DRAWN]  # the cap
    draw.signal_share = 1.0
    assert sum(map(len, drawn_from("w" * 100, draw))) == 4 * MAX_DRAWN
    assert drawn_from("ws", draw) == ["ws"]  # the end of the data


def test_rewards_that_differ_by_less_than_float32_sees_have_a_signal_everywhere():
    t = trainer(batch_size=1, dynamic_sampling="reward", reward_fn=lambda asked, _: [1.0, 1 + 1e-12] * 2)
    batch = t.collect(problems(8), 0)
    assert batch.num_queries == 1 and all(s.advantage != 0 and s.has_signal for s in batch.samples)


def test_a_stop_is_heard_between_the_rounds_of_a_draw():
    asked = []

    def tied(problems, responses):
        asked.extend(responses)
        t.stop.requested = True
        return [0.0] * len(responses)

    t = trainer(batch_size=2, dynamic_sampling="reward", reward_fn=tied)
    with pytest.raises(Interrupted):
        t.collect(problems(16), 0)
    assert len(asked) == 2 * 4  # one round


def test_without_dynamic_sampling_all_are_taken_at_once():
    draw = QueryDraw("off", 4, 2)
    assert drawn_from("wwrs", draw) == ["wwrs"]
    assert drawn_from("w", draw) == ["w"]


def test_tied_groups_are_counted_and_not_trained_on():
    def reward(asked, responses):
        """By problem: all right, all wrong, a dense reward that nobody passes, or one that half pass."""
        kinds = [int(problem.id[0]) % 4 for problem in asked]
        dealt = [(1.0, 1.0), (0.0, 0.0), (0.5, 0.2), (1.0, 0.0)]
        return [dealt[kind][i % 2] for i, kind in enumerate(kinds)]

    asked = sorted(problems(40), key=lambda problem: problem.id[1:])
    kinds = [int(problem.id[0]) % 4 for problem in asked]
    for mode, trained in (("reward", {2, 3}), ("pass", {3})):
        t = trainer(batch_size=4, dynamic_sampling=mode, reward_fn=reward)
        batch = t.collect(asked, 0)
        drawn = kinds[: batch.num_queries]
        with_signal = [kind in trained for kind in drawn]
        assert [all(s.has_signal for s in g) for g in batch.groups()] == with_signal
        assert [any(s.has_signal for s in g) for g in batch.groups()] == with_signal
        assert batch.num_queries == batch.metrics["queries"] > 4 <= sum(with_signal)
        assert batch.metrics["groups_all_right"] == drawn.count(0) / len(drawn)
        assert batch.metrics["groups_all_wrong"] == (drawn.count(1) + drawn.count(2)) / len(drawn)
        updates = batch.minibatches()
        assert len(updates) == 4 and sum(map(len, updates)) == 4 * sum(with_signal)
        metrics = t.update(batch)
        assert metrics["updates_without_signal"] == 0 and metrics["grad_norm"] > 0


def test_the_logged_kl_is_that_of_the_responses_that_have_one():
    """A response that was drawn and not kept has no KL, and must not dilute the others'."""

    def reward(asked, responses):
        return [
            r if int(p.id[0]) < 3 else 0.0
            for p, r in zip(asked, shared_prefix(asked, responses), strict=True)
        ]

    t = trainer(batch_size=2, dynamic_sampling="reward", kl_coef=0.1, learning_rate=1e-3, reward_fn=reward)
    t.train_step(problems(16))  # at the start the KL is 0
    batch = t.collect(problems(16, seed=1), 1)
    kl = t.update(batch)["kl"]
    assert len(batch.samples) > sum(map(len, batch.minibatches())) > 0
    sizes = [len(samples) for samples in batch.minibatches()]
    mean = sum(n * update["kl"] for n, update in zip(sizes, batch.updates, strict=True)) / sum(sizes)
    assert kl == pytest.approx(mean) and kl > 0


@pytest.mark.parametrize("frequency", [1, 3])
def test_each_epoch_still_takes_each_problem_once(tmp_path, frequency):
    asked = []

    def half_tied(problems, responses):
        asked.extend(problem.id for problem in problems[::4])
        rewards = shared_prefix(problems, responses)
        return [r if int(p.id[0]) % 2 else 0.0 for p, r in zip(problems, rewards, strict=True)]

    settings = {"batch_size": 2, "num_epochs": 2, "eval_frequency": 0, "update_frequency": frequency}
    settings |= {"output_dir": str(tmp_path), "run_name": "run", "dynamic_sampling": "reward"}
    t = trainer(reward_fn=half_tied, **settings)
    train = problems(15)
    run = TrainingRun(t, train, problems(2, seed=1))
    t.evaluate = lambda _: {k: v for k, v in EVALUATION.items() if k != "step"}
    run.train()
    ids = sorted(problem.id for problem in train)
    assert sorted(asked[:15]) == sorted(asked[15:]) == ids and asked[:15] != asked[15:]
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    drawn = np.cumsum([line["queries"] for line in lines])
    assert 15 in drawn and drawn[-1] == 30
    for line, end in zip(lines, drawn, strict=True):
        if end not in (15, 30):  # the last rollout batch of an epoch takes what is left
            assert round(line["queries"] * (1 - line["zero_variance_groups"])) >= 2
    assert any(line["queries"] > 2 for line in lines)


def test_a_run_without_any_signal_draws_to_the_cap_and_changes_no_weight(tmp_path):
    settings = {"batch_size": 1, "mini_batch_size": 1, "num_epochs": 1, "eval_frequency": 0}
    settings |= {"output_dir": str(tmp_path), "run_name": "run", "dynamic_sampling": "pass"}
    t = trainer(reward_fn=lambda asked, responses: [0.0] * len(asked), **settings)
    before = [p.detach().clone() for p in t.model.parameters()]
    t.train(problems(2 * MAX_DRAWN + 3), problems(2, seed=1))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["queries"] for line in lines] == [MAX_DRAWN, MAX_DRAWN, 3]
    assert [line["updates_without_signal"] for line in lines] == [1, 1, 1]
    assert all(map(torch.equal, before, t.model.parameters()))
