"""Validation, part 1: the losses and advantages against float64 loops, and what must never matter to them.

Each function is a generator of checks. The paper's figures stand here once more, so that a changed default
shows. Shapes: B sequences, T response positions.
"""

import functools
import math

import torch

import gspo_implementation as gspo
from gspo.checks import float64_reference as reference
from gspo.checks.report import Check, at_most, each_at_most, exactly

PAPER_CLIP_RANGES = {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "grpo": (0.2, 0.27)}
LOSSES = {"gspo": "gspo_loss", "gspo_token": "gspo_token_loss", "grpo": "grpo_loss"}


def loss_of(kind: str):
    return getattr(gspo, LOSSES[kind])


def example(kind: str, seed: int = 0, rows: int = 12, width: int = 9, dtype=torch.float64):
    """Ragged rows whose ratios fall on both sides of the clip range; both signs and a zero of advantage.

    Returns log_probs (B, T) with a gradient, old_log_probs (B, T), advantages (B,), mask (B, T).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = 0.4 if kind == "grpo" else 1.5e-3
    old = -torch.rand(rows, width, generator=generator, dtype=dtype) * 3 - 0.1
    log_probs = old + spread * torch.randn(rows, width, generator=generator, dtype=dtype)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    advantages[0] = 0.0
    return log_probs.requires_grad_(), old, advantages, mask


def value_and_gradient(loss_fn, log_probs, *rest) -> tuple[float, torch.Tensor]:
    log_probs = log_probs.detach().clone().requires_grad_()
    loss = loss_fn(log_probs, *rest)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return loss.item(), log_probs.grad


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return ((measured - expected).norm() / expected.norm()).item()


def importance_ratio():
    fault = (
        "sequence_importance_ratio: exp of the mean, not the sum, of log pi - log pi_old over the response"
    )
    log_probs, old, _, mask = example("grpo")
    ratio = gspo.sequence_importance_ratio(log_probs.detach(), old, mask)
    expected = [
        math.prod(math.exp(d) for d in (p - o)[m].tolist()) ** (1 / m.sum().item())
        for p, o, m in zip(log_probs, old, mask, strict=True)
    ]
    error = relative_error(ratio, torch.tensor(expected, dtype=torch.float64))
    yield at_most(
        "the ratio is the geometric mean of the token ratios", error, 1e-12, "relative error", fault
    )
    whole = [x.detach()[mask.all(1)] for x in (log_probs, old, mask)]
    once, twice = (gspo.sequence_importance_ratio(*(x.repeat(1, n) for x in whole)) for n in (1, 2))
    name = "a response repeated twice has the same ratio (length normalised)"
    yield at_most(name, relative_error(twice, once), 1e-12, "relative error", fault)


def on_policy():
    figures = {}
    for kind in LOSSES:
        log_probs, _, advantages, mask = example(kind, dtype=torch.float32)
        _, metrics = loss_of(kind)(log_probs, log_probs.detach(), advantages, mask)
        extremes = [metrics[f"importance_ratio_{end}"] for end in ("min", "max")]
        figures[kind] = max(abs(ratio - 1) for ratio in extremes) + metrics["clip_fraction"]
    yield each_at_most(
        "on policy the ratio is exactly 1 and nothing clips", figures, 0.0, "|ratio - 1| + clip fraction",
        "the loss's log pi - log pi_old",
    )  # fmt: skip


def value_and_gradient_match():
    values, gradients, fractions = {}, {}, {}
    for kind, ranges in PAPER_CLIP_RANGES.items():
        inputs = example(kind, seed=1)
        slow = functools.partial(reference.loss, kind)
        expected, expected_gradient = value_and_gradient(slow, *inputs, *ranges)
        value, gradient = value_and_gradient(loss_of(kind), *inputs)
        values[kind] = abs(value / expected - 1)
        gradients[kind] = relative_error(gradient, expected_gradient)
        share = loss_of(kind)(*inputs)[1]["clip_fraction"]
        fractions[kind] = abs(share - reference.clip_fraction(kind, *inputs, *ranges))
    yield each_at_most(
        "the loss equals a float64 loop over the paper's formula", values, 1e-12, "relative error",
        "sign, clipping, clip range, mean over tokens and then over sequences",
    )  # fmt: skip
    yield each_at_most(
        "so does its gradient", gradients, 1e-10, "relative error", "what is detached, min() and clip()"
    )
    yield each_at_most(
        "clip_fraction counts tokens whose clipped branch is in force", fractions, 1e-12, "difference",
        "clipped is A > 0 and w > 1 + right, or A < 0 and w < 1 - left",
    )  # fmt: skip


def closed_form():
    log_probs, old, advantages, mask = inputs = example("gspo", seed=3)
    _, gradient = value_and_gradient(gspo.gspo_loss, *inputs)
    left, right = PAPER_CLIP_RANGES["gspo"]
    lengths = mask.sum(1)
    s = torch.exp(((log_probs - old) * mask).sum(1) / lengths).detach()
    clipped = ((advantages > 0) & (s > 1 + right)) | ((advantages < 0) & (s < 1 - left))
    closed = torch.where(clipped, 0.0, -s * advantages / (lengths * len(mask)))[:, None] * mask
    yield at_most(
        "gspo: the gradient is the paper's closed form", relative_error(gradient, closed), 1e-10,
        "relative error", "gspo_loss: -s A / (|y| B) at every token of a response that is not clipped",
    )  # fmt: skip
    signs = ["up" if _gradient_at("gspo", advantage, 1.0) < 0 else "down" for advantage in (1, -1)]
    yield exactly(
        "gspo: a step raises what was rewarded and lowers what was not", " ".join(signs), "up down",
        "likelihood", "gspo_loss: the sign of the loss",
    )  # fmt: skip


def gspo_token_agrees():
    inputs = example("gspo", seed=7)
    (value, gradient), (token_value, token_gradient) = (
        value_and_gradient(loss_of(kind), *inputs) for kind in ("gspo", "gspo_token")
    )
    error = abs(token_value / value - 1) + relative_error(token_gradient, gradient)
    yield at_most(
        "gspo_token with one advantage a response is gspo", error, 1e-10, "relative error",
        "gspo_token_loss: sg[s] * pi / sg[pi]",
    )  # fmt: skip


def clipping_side():
    for kind, (left, right) in PAPER_CLIP_RANGES.items():
        cases = ((1, 1 + 2 * right), (-1, 1 - 2 * left), (1, 1 - 2 * left), (-1, 1 + 2 * right), (-1, 50.0))
        measured = ["flows" if _gradient_at(kind, *case) else "stops" for case in cases]
        yield exactly(
            f"{kind}: clipping stops the gradient on the side it should", " ".join(measured),
            "stops stops flows flows flows", "A>0 above, A<0 below, A>0 below, A<0 above, far above:",
            f"{LOSSES[kind]}: min(w A, clip(w) A)",
        )  # fmt: skip


def _gradient_at(kind: str, advantage: float, ratio: float) -> float:
    """Of the loss by the log-probability of a token, for one response with this advantage and ratio."""
    old, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return value_and_gradient(loss_of(kind), old + math.log(ratio), old, advantages, mask)[1][0, 0].item()


def clip_ranges():
    for kind, expected in PAPER_CLIP_RANGES.items():
        config = gspo.GSPOConfig(algorithm=kind).resolve(10**9)
        measured = [_edge(kind, -1), _edge(kind, 1), config.left_clip_range, config.right_clip_range]
        text = "loss: left {:.4g}, right {:.4g}; trainer: left {:.4g}, right {:.4g}"
        yield Check(
            f"{kind}: the clip ranges are the paper's",
            all(math.isclose(m, e, rel_tol=1e-6) for m, e in zip(measured, 2 * expected, strict=True)),
            text.format(*measured), text.format(*2 * expected),
            f"{LOSSES[kind]}'s defaults, gspo_config.PRESETS",
        )  # fmt: skip


def _edge(kind: str, sign: int) -> float:
    """How far from 1, on the side of the advantage's sign, the ratio may go before the gradient stops."""
    flows, stops = 0.0, 0.99
    for _ in range(50):
        middle = (flows + stops) / 2
        flows, stops = (middle, stops) if _gradient_at(kind, sign, 1 + sign * middle) else (flows, middle)
    return flows


def sequence_mean():
    mask = torch.tensor([[True] * 9, [True] + [False] * 8])
    zeros, advantages = torch.zeros(2, 9, dtype=torch.float64), torch.tensor([-1.0, 1.0]).double()
    errors = {}
    for kind in LOSSES:
        value, gradient = value_and_gradient(loss_of(kind), zeros, zeros, advantages, mask)
        errors[kind] = abs(value) + (gradient.sum(1) - torch.tensor([0.5, -0.5])).abs().max().item()
    yield each_at_most(
        "a long failure and a short success weigh the same", errors, 1e-12, "error",
        "a mean over the tokens of each sequence, then over sequences; not over all tokens",
    )  # fmt: skip


def padding():
    errors = {}
    for kind in LOSSES:
        log_probs, old, advantages, mask = example(kind, seed=4)
        mask[3] = False  # a row without tokens
        value, gradient = value_and_gradient(loss_of(kind), log_probs, old, advantages, mask)
        junk = [torch.where(mask, x.detach(), math.nan) for x in (log_probs, old)]
        wider = [torch.nn.functional.pad(x, (0, 5), value=math.nan) for x in junk]
        wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
        wide_value, wide_gradient = value_and_gradient(loss_of(kind), *wider, advantages, wide_mask)
        errors[kind] = abs(wide_value / value - 1) + relative_error(wide_gradient[:, :-5], gradient)
    yield each_at_most(
        "padding never matters, NaN included", errors, 1e-12, "relative error",
        "the mask, in every sum and every count",
    )  # fmt: skip


def micro_batches():
    errors = {}
    for kind, ranges in PAPER_CLIP_RANGES.items():
        inputs = example(kind, seed=8)
        value, gradient = value_and_gradient(loss_of(kind), *inputs)
        rows, errors[kind] = len(inputs[3]), 0.0
        for size in (1, 2, 5):
            parts = [
                value_and_gradient(loss_of(kind), *(x[i : i + size] for x in inputs), *ranges, rows)
                for i in range(0, rows, size)
            ]
            sums = sum(part[0] for part in parts), torch.cat([part[1] for part in parts])
            errors[kind] += abs(sums[0] / value - 1) + relative_error(sums[1], gradient)
    yield each_at_most(
        "micro-batches of 1, 2 or 5 add up to the whole", errors, 1e-12, "relative error", "the denominator"
    )


def old_policy_is_constant():
    errors = {}
    for kind in LOSSES:
        log_probs, _, advantages, mask = example(kind, seed=1)
        _, expected = value_and_gradient(loss_of(kind), log_probs, log_probs.detach(), advantages, mask)
        log_probs = log_probs.detach().requires_grad_()
        loss_of(kind)(log_probs, log_probs, advantages, mask)[0].backward()
        errors[kind] = relative_error(log_probs.grad, expected)
    yield each_at_most(
        "no gradient flows to the old policy", errors, 1e-12, "relative error", "old_log_probs detached"
    )


def overflow():
    infinite = dict.fromkeys(LOSSES, 0)
    for kind in LOSSES:
        for shift in (-1e4, -100.0, 100.0, 1e4):
            old = torch.full((2, 3), -1.0)
            advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool)
            value, gradient = value_and_gradient(loss_of(kind), old + shift, old, advantages, mask)
            infinite[kind] += not (math.isfinite(value) and gradient.isfinite().all())
    yield each_at_most(
        "log-ratios of 10,000 stay finite, and their gradients", infinite, 0, "not finite",
        "exp() of an unbounded log-ratio",
    )  # fmt: skip


def advantages():
    fault = "group_advantages: (r - mean) / (unbiased std + 1e-6) of each group, ties by max - min"
    ties = [gspo.group_advantages(torch.full((7,), r), 7).abs().max().item() for r in (0.1, 0.3, 0.7, 1 / 3)]
    yield exactly("equal rewards have advantages of exactly 0", max(ties), 0.0, "largest", fault)
    lone = [1.0] + [0.0] * 15  # the largest advantages there are
    rewards = [0.0, 1.0, 0.25, 1.0, None, 0.5, 0.5, 0.0, 0.3, 0.3, 0.3, 0.3, None, None, None, 1.0]
    given = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
    measured = gspo.group_advantages(given, 4)
    both = torch.cat([measured, gspo.group_advantages(torch.tensor(lone, dtype=torch.float64), 16)])
    expected = reference.advantages(rewards, 4) + reference.advantages(lone, 16)
    name = "advantages are (r - mean) / std of the group's judged rewards"
    yield at_most(
        name,
        relative_error(both, torch.tensor(expected, dtype=torch.float64)),
        1e-12,
        "relative error",
        fault,
    )
    sums = measured.view(-1, 4).sum(1).abs().max().item()
    yield at_most("they are centred in each group", sums, 1e-12, "largest sum", fault)


CHECKS = [
    importance_ratio,
    on_policy,
    value_and_gradient_match,
    closed_form,
    gspo_token_agrees,
    clipping_side,
    clip_ranges,
    sequence_mean,
    padding,
    micro_batches,
    old_policy_is_constant,
    overflow,
    advantages,
]
