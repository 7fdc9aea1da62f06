"""Every loss of ALGORITHMS against a float64 loop, value and gradient; and what must never matter to it."""

import pytest
import torch

from gspo.checks import float64_reference as reference
from gspo.checks.losses import (
    ALGORITHMS,
    PAPER_CLIP_RANGES,
    denominator_of,
    example,
    loss_of,
    ranges_of,
    reference_of,
    value_and_gradient,
)
from gspo_implementation import (
    MAX_LOG_RATIO,
    cispo_loss,
    dppo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    kl_penalty,
    sapo_loss,
)


def test_the_papers_algorithms_are_in_the_table():
    assert set(PAPER_CLIP_RANGES) <= set(ALGORITHMS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_value_gradient_and_clip_fraction_match_the_loop(algorithm, seed):
    log_probs, old, advantages, mask = example(algorithm, seed)
    slow = reference_of(algorithm)
    expected, expected_gradient = value_and_gradient(
        slow, log_probs, old, advantages, mask, *ranges_of(algorithm)
    )
    value, gradient = value_and_gradient(loss_of(algorithm), log_probs, old, advantages, mask)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)

    _, metrics = loss_of(algorithm)(log_probs, old, advantages, mask)
    _, share = slow(log_probs, old, advantages, mask, *ranges_of(algorithm))
    if ALGORITHMS[algorithm].clips:
        assert 0.05 < share < 0.95, "the example must have clipped and unclipped tokens"
    assert metrics["clip_fraction"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("algorithm", PAPER_CLIP_RANGES)
def test_clip_fractions_by_side_and_of_what_can_clip(algorithm):
    """By hand: 4 sequences of 2, 1, 3 and 2 tokens, which move by the same factor in all their tokens.

    The first is clipped above its range and the third below. The second moved away from its advantage, and
    the fourth has none: its two tokens can never clip.
    """
    factors = torch.tensor([1.5, 0.5, 0.5, 1.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    mask = torch.arange(3) < torch.tensor([2, 1, 3, 2])[:, None]
    old = torch.full((4, 3), -1.0, dtype=torch.float64)
    _, metrics = loss_of(algorithm)(old + factors.log()[:, None], old, advantages, mask)
    assert metrics["clip_fraction"] == pytest.approx(5 / 8)
    assert metrics["clip_fraction_eligible"] == pytest.approx(5 / 6)
    assert metrics["clip_fraction_left"] == pytest.approx(3 / 6)
    assert metrics["clip_fraction_right"] == pytest.approx(2 / 6)
    assert metrics["eligible_fraction"] == pytest.approx(6 / 8)
    assert metrics["clip_fraction_sequences"] == pytest.approx(2 / 4)


@pytest.mark.parametrize("algorithm", ["gspo_token", "grpo", "sapo", "cispo", "dppo"])
def test_token_advantages_match_the_loop(algorithm):
    log_probs, old, _, mask = example(algorithm, 5)
    mask[3] = False
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    advantages[~mask] = torch.nan  # as masked log-probabilities may be
    slow = reference_of(algorithm)
    expected, expected_gradient = value_and_gradient(
        slow, log_probs, old, advantages, mask, *ranges_of(algorithm)
    )
    value, gradient = value_and_gradient(loss_of(algorithm), log_probs, old, advantages, mask)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)


def test_gspo_token_equals_gspo_for_equal_advantages():
    inputs = example("gspo", 7)
    (value, gradient), (token_value, token_gradient) = (
        value_and_gradient(loss, *inputs) for loss in (gspo_loss, gspo_token_loss)
    )
    assert token_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(token_gradient, gradient, rtol=1e-10, atol=1e-15)
    metrics, token_metrics = gspo_loss(*inputs)[1], gspo_token_loss(*inputs)[1]
    assert metrics == pytest.approx(token_metrics)


def test_gspo_gradient_is_the_closed_form():
    # -1/B s_i A_i / |y_i| at every token of a row that is not clipped, 0 where it is
    log_probs, old, advantages, mask = example("gspo", 3)
    _, gradient = value_and_gradient(gspo_loss, log_probs, old, advantages, mask)
    lengths = mask.sum(1)
    s = torch.exp(((log_probs - old) * mask).sum(1) / lengths).detach()
    clipped = ((advantages > 0) & (s > 1 + 4e-4)) | ((advantages < 0) & (s < 1 - 3e-4))
    closed = torch.where(clipped, 0.0, -s * advantages / (lengths * len(mask)))[:, None] * mask
    torch.testing.assert_close(gradient, closed, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token", "grpo", "sapo", "cispo", "dppo"])
def test_on_policy_the_gradient_is_the_policy_gradient(algorithm):
    """That of A log pi, in the mean of the algorithm."""
    log_probs, _, advantages, mask = example(algorithm, 2)
    mask[3] = False
    _, gradient = value_and_gradient(loss_of(algorithm), log_probs, log_probs.detach(), advantages, mask)
    weights = advantages[:, None] * mask / denominator_of(algorithm, mask)  # (B, T)
    if ALGORITHMS[algorithm].mean_over == "responses":
        weights /= mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(gradient, -weights, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("algorithm", ["cispo", "dppo"])
def test_a_long_response_weighs_more_in_a_mean_over_tokens(algorithm):
    """Nine tokens of a failure and one of a success: the mean over ten tokens has a gradient of 1/10 each."""
    mask = torch.arange(9) < torch.tensor([9, 1])[:, None]
    zeros = torch.zeros(2, 9, dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    _, gradient = value_and_gradient(loss_of(algorithm), zeros, zeros, advantages, mask)
    assert gradient.sum(1).tolist() == pytest.approx([0.9, -0.1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_policy_nothing_clips_and_the_ratio_is_exactly_one(algorithm):
    log_probs, _, advantages, mask = example(algorithm, 2, dtype=torch.float32)
    _, metrics = loss_of(algorithm)(log_probs, log_probs.detach(), advantages, mask)
    assert metrics["clip_fraction"] == metrics["importance_ratio_std"] == 0
    assert metrics["importance_ratio_min"] == metrics["importance_ratio_max"] == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_masked_positions_never_matter(algorithm, junk):
    log_probs, old, advantages, mask = example(algorithm, 4)
    spoiled = [torch.where(mask, x, junk) for x in (log_probs.detach(), old)]
    value, gradient = value_and_gradient(loss_of(algorithm), log_probs, old, advantages, mask)
    spoiled_value, spoiled_gradient = value_and_gradient(loss_of(algorithm), *spoiled, advantages, mask)
    assert spoiled_value == value and torch.equal(spoiled_gradient, gradient)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_row_without_tokens_contributes_nothing(algorithm):
    log_probs, old, advantages, mask = example(algorithm, 6)
    mask[3] = False
    value, gradient = value_and_gradient(loss_of(algorithm), log_probs, old, advantages, mask)
    kept = [i for i in range(len(mask)) if i != 3]
    denominators = [denominator_of(algorithm, mask[rows]) for rows in (kept, slice(None))]
    other, _ = value_and_gradient(
        loss_of(algorithm), log_probs[kept], old[kept], advantages[kept], mask[kept]
    )
    assert value == pytest.approx(other * denominators[0] / denominators[1], rel=1e-12)
    assert gradient[3].abs().max() == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_padding_and_order_never_matter(algorithm):
    loss_fn = loss_of(algorithm)
    log_probs, old, advantages, mask = inputs = example(algorithm, 8)
    value, gradient = value_and_gradient(loss_fn, *inputs)
    rows, denominator = len(mask), denominator_of(algorithm, mask)
    for size in (1, 2, 5, rows):
        parts = []
        for start in range(0, rows, size):
            part = [x[start : start + size] for x in inputs]
            parts.append(value_and_gradient(loss_fn, *part, *ranges_of(algorithm), denominator))
        values, gradients = zip(*parts, strict=True)
        assert sum(values) == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-16)
    padded = [torch.nn.functional.pad(x, (0, 4)) for x in (log_probs, old)]
    padded_mask = torch.nn.functional.pad(mask, (0, 4), value=False)
    padded_value, _ = value_and_gradient(loss_fn, *padded, advantages, padded_mask)
    assert padded_value == pytest.approx(value, rel=1e-12)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    shuffled, _ = value_and_gradient(loss_fn, *(x[order] for x in inputs))
    assert shuffled == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shift", [-1e4, -100, 100, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_runaway_ratios_stay_finite(algorithm, shift, advantage):
    old = torch.full((2, 3), -1.0)
    value, gradient = value_and_gradient(
        loss_of(algorithm), old + shift, old, torch.full((2,), advantage), torch.ones(2, 3, dtype=torch.bool)
    )
    assert torch.isfinite(torch.tensor(value)) and gradient.isfinite().all()
    if advantage > 0 and shift > 0 and algorithm in PAPER_CLIP_RANGES:  # clipped
        assert gradient.abs().max() == 0


def test_bound_is_out_of_sight():
    # Below the bound the loss is the unbounded one. The largest ratio that any rule looks at is 100.
    old = torch.zeros(1, 1, dtype=torch.float64)
    value, _ = value_and_gradient(
        gspo_loss, old + 0.9 * MAX_LOG_RATIO, old, -torch.ones(1), torch.ones(1, 1, dtype=torch.bool)
    )
    assert value == pytest.approx(torch.tensor(0.9 * MAX_LOG_RATIO, dtype=torch.float64).exp().item())


def test_kl_penalty_gradient_vanishes_at_the_reference():
    log_probs, _, _, mask = example("gspo", 9)
    value, gradient = value_and_gradient(kl_penalty, log_probs, log_probs.detach(), mask, len(mask))
    assert value == 0 and gradient.abs().max() == 0


def test_advantages_match_the_loop():
    rewards = [0.0, 1.0, 0.25, 1.0, None, 0.5, 0.5, 0.0, 0.3, 0.3, 0.3, 0.3, None, None, None, 1.0]
    tensor = torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float64)
    assert group_advantages(tensor, 4).tolist() == pytest.approx(reference.advantages(rewards, 4), rel=1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_gradient_flows_to_the_old_policy(algorithm):
    log_probs, _, advantages, mask = example(algorithm, 1)
    _, detached = value_and_gradient(loss_of(algorithm), log_probs, log_probs.detach(), advantages, mask)
    log_probs = log_probs.detach().requires_grad_()
    loss_of(algorithm)(log_probs, log_probs, advantages, mask)[0].backward()
    assert torch.equal(log_probs.grad, detached) and detached.abs().max() > 0


def test_bad_shapes_and_ranges_are_refused():
    log_probs, old, advantages, mask = example("gspo", 0)
    with pytest.raises(ValueError):
        gspo_loss(log_probs, old[:, :-1], advantages, mask)
    with pytest.raises(ValueError):
        gspo_loss(log_probs, old, advantages[:-1], mask)
    with pytest.raises(ValueError):
        gspo_loss(log_probs, old, mask.double(), mask)  # GSPO has one advantage per response
    with pytest.raises(ValueError):
        gspo_loss(log_probs, old, advantages, mask.double())
    with pytest.raises(ValueError):
        grpo_loss(log_probs, old, advantages, mask, left_clip_range=0.0)
    with pytest.raises(ValueError):
        sapo_loss(log_probs, old, advantages, mask, right_clip_range=0.2)
    with pytest.raises(ValueError):
        cispo_loss(log_probs, old, advantages, mask, left_clip_range=0.2)
    with pytest.raises(ValueError):
        dppo_loss(log_probs, old, advantages, mask, left_clip_range=-0.2)
