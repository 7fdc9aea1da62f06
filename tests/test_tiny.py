"""The algorithm in numbers that can be worked out by hand."""

import math

import pytest
import torch

from gspo.training.intervals import describe_gain, paired_interval, wilson_interval
from gspo_implementation import (
    cispo_loss,
    dppo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    kl_penalty,
    sapo_loss,
    sequence_importance_ratio,
)

log = math.log


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def test_advantages_of_one_success_in_four():
    # mean 1/4, unbiased std sqrt((9/16 + 3/16) / 3) = 1/2
    assert group_advantages(rows(1, 0, 0, 0), 4).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_advantages_do_not_cross_groups():
    assert group_advantages(rows(1, 0, 5, 5), 2).tolist() == pytest.approx([0.7071, -0.7071, 0, 0], abs=1e-4)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1 / 3])
def test_ties_are_exactly_zero(reward):
    assert group_advantages(torch.full((7,), reward), 7).abs().max() == 0


def test_ungraded_response_stays_out_of_its_group():
    assert group_advantages(rows(1, math.nan, 0, math.nan), 4).tolist() == pytest.approx(
        [0.7071, 0, -0.7071, 0], abs=1e-4
    )
    assert group_advantages(rows(1, math.nan), 2).tolist() == [0, 0]


def test_advantages_refuse_what_cannot_be_grouped():
    for rewards, size in ((rows(1, 0, 1), 2), (rows(1, 0), 1), (rows([1, 0]), 2)):
        with pytest.raises(ValueError):
            group_advantages(rewards, size)


def test_sequence_ratio_is_the_geometric_mean():
    # token ratios 2 and 8: sqrt(16) = 4; then one token of ratio 3, the second masked
    ratio = sequence_importance_ratio(
        rows([log(2), log(8)], [log(3), 9]), rows([0, 0], [0, 0]), torch.tensor([[True, True], [True, False]])
    )
    assert ratio.tolist() == pytest.approx([4, 3])


def test_response_repeated_twice_has_the_same_ratio():
    once = sequence_importance_ratio(rows([0.1, 0.3]), rows([0, 0]), ones(1, 2))
    twice = sequence_importance_ratio(rows([0.1, 0.3, 0.1, 0.3]), rows([0, 0, 0, 0]), ones(1, 4))
    assert once.item() == pytest.approx(twice.item())


def test_gspo_loss_by_hand():
    # s = 1.1 with A = 2 is cut to 1.0004 * 2; s = 1.1 with A = -1 is not: -1.1. Mean .4504, loss -.4504
    loss, metrics = gspo_loss(rows([log(1.1)], [log(1.1)]), rows([0], [0]), rows(2, -1), ones(2, 1))
    assert loss.item() == pytest.approx(-(1.0004 * 2 - 1.1) / 2)
    assert metrics["clip_fraction"] == 0.5 and metrics["clip_fraction_sequences"] == 0.5
    assert metrics["importance_ratio_mean"] == pytest.approx(1.1)


def test_clip_fraction_is_per_token_and_per_sequence():
    # the clipped response has 3 of 4 tokens
    mask = torch.tensor([[True, True, True], [True, False, False]])
    _, metrics = gspo_loss(rows([0.3, 0, 0], [0, 0, 0]), torch.zeros(2, 3), rows(1, 1), mask)
    assert (metrics["clip_fraction"], metrics["clip_fraction_sequences"]) == (0.75, 0.5)


def test_gspo_averages_sequences_not_tokens():
    # A long failure and a short success weigh the same: on-policy objective (1 - 1) / 2 = 0
    mask = torch.tensor([[True] * 5, [True] + [False] * 4])
    loss, _ = gspo_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([-1.0, 1.0]), mask)
    assert loss.item() == 0


def test_grpo_clips_each_token():
    # token ratios 1.5 (cut to 1.27) and 1.0
    loss, metrics = grpo_loss(rows([log(1.5), 0]), rows([0, 0]), rows(1), ones(1, 2))
    assert loss.item() == pytest.approx(-(1.27 + 1) / 2)
    assert metrics["clip_fraction"] == 0.5
    assert metrics["importance_ratio_max"] == pytest.approx(1.5)


def test_gspo_token_takes_an_advantage_per_token():
    # on policy every s_it is 1: the objective is the mean of the advantages
    loss, _ = gspo_token_loss(rows([0, 0]), rows([0, 0]), rows([3.0, -1.0]), ones(1, 2))
    assert loss.item() == pytest.approx(-1.0)


def test_sapo_gates_each_token():
    # w = 1 + log(3): sigmoid(log 3) = 3/4, times 4. With A < 0 tau is 1.05: at w = 1 the gate is 2 / 1.05
    w = log(1 + log(3))
    loss, metrics = sapo_loss(rows([w, w], [0, 0]), torch.zeros(2, 2), rows(1, -1), ones(2, 2))
    assert loss.item() == pytest.approx(-(3 - 2 / 1.05) / 2)
    assert metrics["clip_fraction"] == metrics["eligible_fraction"] == 0  # no token can be clipped
    assert metrics["importance_ratio_max"] == pytest.approx(1 + log(3))


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    # ratios 8 (capped to 5), 2 and 8 (capped): mean over three tokens of weight x A x log pi
    log_probs = rows([-1, -2], [-3, 9]).requires_grad_()
    old = rows([-1 - log(8), -2 - log(2)], [-3 - log(8), 9])
    loss, metrics = cispo_loss(log_probs, old, rows(1, -1), torch.tensor([[True, True], [True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(-(5 * -1 + 2 * -2 - 5 * -3) / 3)
    assert log_probs.grad.tolist() == [pytest.approx([-5 / 3, -2 / 3]), pytest.approx([5 / 3, 0])]
    assert metrics["clip_fraction_right"] == pytest.approx(2 / 3) and metrics["clip_fraction_left"] == 0


def test_dppo_stops_tokens_whose_probability_moves_too_far():
    # from .5 to .7 and from .01 to .05, rewarded: the first is stopped, though its ratio is the smaller one.
    # From .5 to .7 and from .5 to .3, not rewarded: the second is stopped.
    old, new = rows([0.5, 0.01], [0.5, 0.5]).log(), rows([0.7, 0.05], [0.7, 0.3]).log().requires_grad_()
    loss, metrics = dppo_loss(new, old, rows(1, -1), ones(2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(-(5 - 1.4) / 4)
    assert new.grad.tolist() == [pytest.approx([0, -5 / 4]), pytest.approx([1.4 / 4, 0])]
    assert (metrics["clip_fraction_left"], metrics["clip_fraction_right"]) == (0.25, 0.25)


def test_kl_penalty_by_hand():
    # r = pi_ref / pi = 1/2: 1/2 - 1 + log 2
    assert kl_penalty(rows([log(2)]), rows([0]), ones(1, 1), 1).item() == pytest.approx(log(2) - 0.5)


def test_intervals():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson_interval(0.0, 50)[1] == pytest.approx(0.0714, abs=1e-3)
    # differences 0, 1, 2 and t(2) = 4.303: 1 +- 4.303 / sqrt(3)
    assert paired_interval([0, 0, 0], [0, 1, 2]) == pytest.approx((1, 1 - 2.4843, 1 + 2.4843), abs=1e-3)
    # differences 0 .. 9: t(9) = 2.2622, standard error .9574
    assert paired_interval([0] * 10, range(10))[2] == pytest.approx(4.5 + 2.2622 * 0.9574, abs=2e-3)


def test_a_gain_without_spread_has_no_interval():
    assert describe_gain([0, 0, 0], [0, 1, 2]) == "+1.000  (95 % interval -1.484 to +3.484)"
    same = "(no interval: every problem changed by the same amount)"
    assert describe_gain([0.25, 0.5, 0], [0.25, 0.5, 0]) == f"+0.000  {same}"
    assert describe_gain([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) == f"+0.300  {same}"  # .3 but for rounding
    assert describe_gain([0.25], [0.5]) == "+0.250  (no interval: only one problem)"
    # rewards have any scale: .0001, .0001 and .0004 differ
    small = describe_gain([0, 0, 0], [1e-4, 1e-4, 4e-4], "+.3g")
    assert small == "+0.0002  (95 % interval -0.00023 to +0.00063)"
