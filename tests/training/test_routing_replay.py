"""--routing_replay in the trainer, and the share of experts that change: on tiny-moe."""

import pytest
import torch

from gspo.training.rollout_batch import RolloutBatch
from support.commands import TINY, run_here
from support.on_ranks import finish, start
from support.records import record_of, weights_of_run, without_seconds
from support.runs import EVAL, TRAIN, seed_everything, stop_and_resume, whole_and_resumed
from support.runs import new_trainer as trainer_of_run
from support.sorting import problems, trainer, weights_of

SETTINGS = {
    "batch_size": 4,
    "mini_batch_size": 1,
    "group_size": 8,
    "algorithm": "grpo",
    "learning_rate": 1e-3,
}
REPLAY = SETTINGS | {"routing_replay": True}
NEW = ("routing_changed", "routing_changed_by_minibatch")


def moe(**settings):
    return trainer("tiny-moe", **settings)


def experts_called(t):
    """A list to which each call of a layer's experts adds the experts of each token (N, k)."""
    calls = []
    for layer in t.model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, inputs: calls.append(inputs[1].clone()))
    return calls


def by_pass(calls):
    """(N, L, k) of each forward pass."""
    return [torch.stack(calls[i : i + 4], 1) for i in range(0, len(calls), 4)]


def test_an_update_uses_the_recorded_experts():
    """With one response a pass, the tokens of a pass are those of the prompt and of the response."""
    used = {}
    for replays in (True, False):
        t = moe(**SETTINGS, routing_replay=replays, micro_batch_tokens=1)
        calls = experts_called(t)
        batch = t.collect(problems(4), 0)
        calls.clear()
        t.update(batch)
        chosen = [sample for sample in batch.samples if sample.has_signal]
        recorded = [torch.cat(sample.experts).long() for sample in chosen]
        passes = by_pass(calls)
        assert len(passes) == len(recorded) > 8
        used[replays] = [torch.equal(a, b) for a, b in zip(passes, recorded, strict=True)]
    assert all(used[True]) and not all(used[False])


def test_routing_changed_is_the_share_of_old_experts_that_are_left_out():
    """Counted here with sets, token by token, from what the experts are called with before each update."""
    t = moe(**SETTINGS, micro_batch_tokens=1)
    calls = experts_called(t)
    batch = t.collect(problems(4), 0)
    shares, updates = [], iter(batch.minibatches())
    make = t._update_minibatch

    def update(batch, samples):
        changed = choices = 0
        for sample in next(updates):
            if not sample.has_signal:
                continue
            calls.clear()
            with torch.no_grad():
                t.forward.log_probs(t.model, [sample])
            now = by_pass(calls)[0]
            before = torch.cat(sample.experts).long()
            for position in range(len(sample.rollout.prompt_ids) - 1, len(now)):
                for layer in range(4):
                    old = set(before[position, layer].tolist())
                    changed += len(old - set(now[position, layer].tolist()))
                    choices += len(old)
        shares.append((changed, choices))
        make(batch, samples)

    t._update_minibatch = update
    metrics = t.update(batch)
    found = metrics["routing_changed_by_minibatch"]
    assert found[0] == 0 and len(found) == len(shares) and max(found) > 0
    assert shares[0][0] == 0 < shares[0][1]
    assert found[1:] == pytest.approx([changed / choices for changed, choices in shares[1:]])
    pooled = [sum(column) for column in zip(*shares[1:], strict=True)]
    assert metrics["routing_changed"] == pytest.approx(pooled[0] / pooled[1])


def test_the_first_update_records_nothing_that_is_not_needed():
    t = moe(**REPLAY)
    first, *later = t.collect(problems(4), 1).minibatches()
    assert all(sample.experts is None for sample in first)
    assert all(sample.experts for samples in later for sample in samples if sample.has_signal)


def test_it_is_measured_with_the_noise_and_always_with_a_replay():
    slow = {"learning_rate": 1e-5, "eval_frequency": 2}
    t, replaying = moe(**SETTINGS | slow), moe(**REPLAY | slow)
    for index in range(3):
        measured = [set(NEW) <= set(one.update(one.collect(problems(4), index))) for one in (t, replaying)]
        assert measured == [index != 1, True]
    assert not set(NEW) & set(trainer(**SETTINGS).train_step(problems(4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measuring_changes_nothing(dtype):
    measuring, blind = (moe(**SETTINGS, dtype=dtype) for _ in range(2))
    blind.forward.expert_layers = []
    found, expected = ([one.train_step(problems(4, seed=i)) for i in range(2)] for one in (measuring, blind))
    assert set(NEW) == found[0].keys() - expected[0].keys()
    kept = [{name: value for name, value in line.items() if name not in NEW} for line in found]
    assert without_seconds(kept) == without_seconds(expected)
    assert torch.equal(weights_of(measuring.model), weights_of(blind.model))


def test_the_first_update_is_the_same_and_later_ones_are_not():
    moved = []
    for settings in (SETTINGS, REPLAY):
        t = moe(**settings)
        batch = t.collect(problems(4), 1)
        start = weights_of(t.model)
        t._update_minibatch(batch, batch.minibatches()[0])
        first = weights_of(t.model) - start
        t.update(batch)
        moved.append((first, weights_of(t.model) - start))
    assert torch.equal(moved[0][0], moved[1][0]) and moved[0][0].norm() > 0
    assert not torch.equal(moved[0][1], moved[1][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_stays_has_a_ratio_of_exactly_one(dtype):
    t = moe(**REPLAY | {"learning_rate": 0.0}, dtype=dtype, update_frequency=2)
    for index in range(2):
        metrics = t.update(t.collect(problems(4, seed=index), index))
        assert (metrics["importance_ratio_min"], metrics["importance_ratio_max"]) == (1, 1)
        assert metrics["routing_changed"] == 0


def test_micro_batches_and_checkpointing_never_change_a_replayed_update():
    moved, metrics = [], []
    for settings in (
        {},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 100},
        {"gradient_checkpointing": True},
    ):
        t = moe(**REPLAY, **settings)
        before = weights_of(t.model)
        metrics.append(t.train_step(problems(4)))
        moved.append(weights_of(t.model) - before)
    for other, of_other in zip(moved[1:], metrics[1:], strict=True):
        assert (other - moved[0]).norm() / moved[0].norm() < 5e-3
        assert of_other["routing_changed"] == pytest.approx(metrics[0]["routing_changed"], abs=2e-3)
    assert metrics[0]["routing_changed"] > 0


def test_passes_that_are_halved_keep_the_experts():
    """Memory runs out in the second update, whose experts were recorded in longer passes."""
    t, plain = moe(**REPLAY, micro_batch_tokens=200), moe(**REPLAY, micro_batch_tokens=200)
    batch = t.collect(problems(4), 1)
    backward, calls = t._backward, iter(range(100))

    def fails_once(samples):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(samples)

    t._backward = fails_once
    found, expected = t.update(batch), plain.update(plain.collect(problems(4), 1))
    assert t.forward.halvings == 1
    assert found["routing_changed"] == pytest.approx(expected["routing_changed"], abs=2e-3) != 0
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_group_shares_the_experts_of_its_prompt():
    t = moe(**REPLAY)
    batch = t.collect(problems(4), 1)
    for group in batch.minibatches()[1:]:
        assert len({id(sample.experts[0]) for sample in group if sample.has_signal}) == 1
        for sample in group:
            if sample.has_signal:
                prompt, response = sample.experts
                assert prompt.shape == (len(sample.rollout.prompt_ids), 4, 2)
                assert response.shape == (sample.num_tokens - 1, 4, 2)
                assert response.untyped_storage().nbytes() == response.numel(), "no view of a larger tensor"


def test_a_rollout_batch_that_is_saved_keeps_its_experts(tmp_path):
    t = moe(**REPLAY)
    batch = t.collect(problems(4), 1)
    torch.save(batch.state_dict(), tmp_path / "batch")
    state = torch.load(tmp_path / "batch", weights_only=True)
    again = RolloutBatch.from_state_dict(state, problems(4))
    for saved, sample in zip(again.samples, batch.samples, strict=True):
        assert (saved.experts is None) == (sample.experts is None)
        assert saved.experts is None or all(map(torch.equal, saved.experts, sample.experts))


@pytest.mark.parametrize("update_frequency", [1, 2])
def test_a_stopped_run_goes_on_exactly(tmp_path, update_frequency):
    """Stopped in the middle of a rollout batch, and between the K that were sampled together."""
    settings = {"name": "tiny-moe", **REPLAY, "update_frequency": update_frequency}
    whole, expected, found = whole_and_resumed(tmp_path, TRAIN, EVAL, **settings)
    assert record_of(found) == record_of(expected) and weights_of_run(found) == weights_of_run(expected)
    assert any(line["routing_changed"] > 0 for line in record_of(found)["metrics.jsonl"])
    seed_everything()
    trainer_of_run(tmp_path / "third", **settings).train(TRAIN, EVAL)
    seed_everything()
    stop_and_resume(tmp_path / "fourth", **settings)
    third, fourth = (record_of(tmp_path / name / "run") for name in ("third", "fourth"))
    assert third["metrics.jsonl"] == fourth["metrics.jsonl"]


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="^--routing_replay is for mixtures of experts, and qwen3 is none"):
        trainer(routing_replay=True)


def test_experts_that_cannot_be_replayed_are_refused(monkeypatch):
    monkeypatch.setattr("gspo.policy.expert_routing.TOPK", ())  # as if they were chosen in another way
    with pytest.raises(ValueError, match="^--routing_replay: qwen3_moe cannot be replayed: its experts"):
        moe(routing_replay=True)
    assert "routing_changed" not in moe(**SETTINGS).train_step(problems(4))


def test_the_command_line_refuses_a_dense_model_and_prints_what_is_replayed():
    refused = run_here(*TINY, "--routing_replay", "--dry_run")
    assert refused.returncode == 2 and "qwen3 is none: leave it out" in refused.stderr
    planned = run_here(*TINY, "--model_name", "tiny-moe", "--routing_replay", "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "Routing Replay: the policy is computed with the experts that pi_old chose." in planned.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("more", [[], ["--shard", "full"]], ids=["copies", "shards"])
def test_two_processes_replay_as_one_does(tmp_path, more):
    flags = [*TINY, "--model_name", "tiny-moe", "--routing_replay", "--algorithm", "grpo"]
    flags += ["--num_train_samples", 8, "--mini_batch_size", 2, "--learning_rate", 1e-4]
    flags += ["--output_dir", tmp_path, "--run_name"]
    assert run_here(*flags, "one").returncode == 0
    code, said = finish(start(tmp_path, *flags, "two", *more), tmp_path)
    assert code == 0, said
    alone, together = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    for a, b in zip(alone["metrics.jsonl"], together["metrics.jsonl"], strict=True):
        assert a.keys() == b.keys() and a["routing_changed_by_minibatch"]
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
