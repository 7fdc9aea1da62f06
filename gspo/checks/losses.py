"""Validation, part 1: the losses and advantages against float64 loops, and what must never matter to them.

Each function is a generator of checks. The checks that hold for any clipped loss go over ALGORITHMS, so that
a new loss is checked like the others; those of the paper's own formulas go over PAPER_CLIP_RANGES.

Shapes: B sequences, T response positions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import gspo_implementation as gspo
from gspo.checks import float64_reference as reference
from gspo.checks.report import Check, Checks, at_most, each_at_most, exactly

# Section 5.1 of the paper. The ranges stand here a second time, so that a changed default shows.
PAPER_CLIP_RANGES = {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "grpo": (0.2, 0.27)}
ALGORITHMS = gspo.ALGORITHMS

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def loss_of(algorithm: str) -> Callable:
    return ALGORITHMS[algorithm].loss


def ranges_of(algorithm: str) -> tuple[float | None, float | None]:
    """The paper's left and right clip range. An algorithm that is not in the paper has those of its entry.

    None: it has none on that side.
    """
    entry = ALGORITHMS[algorithm]
    return PAPER_CLIP_RANGES.get(algorithm) or (entry.left_clip_range, entry.right_clip_range)


def denominator_of(algorithm: str, mask: Tensor) -> int:
    """The denominator of the loss of an optimizer update with these tokens, (B, T)."""
    return int(mask.sum()) if ALGORITHMS[algorithm].mean_over == "tokens" else len(mask)


def has_reference(algorithm: str) -> bool:
    return callable(getattr(reference, ALGORITHMS[algorithm].reference or "", None))


def reference_of(algorithm: str) -> reference.Loss:
    """The float64 loss that the algorithm's entry names."""
    return getattr(reference, ALGORITHMS[algorithm].reference)


def missing_reference(algorithm: str) -> Check:
    """The failed check of an algorithm that has nothing to be compared with."""
    return Check(
        f"{algorithm}: there is a float64 reference to compare it with", False,
        f"none named {ALGORITHMS[algorithm].reference}", "a function",
        "gspo/checks/float64_reference.py: write it, and name it in the entry's `reference`",
    )  # fmt: skip


def example(
    algorithm: str, seed: int = 0, rows: int = 12, width: int = 9, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Ragged rows whose ratios fall on both sides of the clip range; both signs and a zero of advantage.

    Returns log_probs (B, T) with a gradient, old_log_probs (B, T), advantages (B,), mask (B, T).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = sum(side or 0.0 for side in ranges_of(algorithm)) or 1.0
    if ALGORITHMS[algorithm].clip_unit != "token":
        spread *= 2  # the mean over a response's tokens varies less than they do
    if ALGORITHMS[algorithm].clips_probability:
        spread *= 3  # a probability moves less than its logarithm
    old = -torch.rand(rows, width, generator=generator, dtype=dtype) * 3 - 0.1
    log_probs = old + spread * torch.randn(rows, width, generator=generator, dtype=dtype)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    advantages[0] = 0.0
    return log_probs.requires_grad_(), old, advantages, mask


def value_and_gradient(
    loss_fn: Callable, log_probs: Tensor, *rest: Tensor | float | None
) -> tuple[float, Tensor]:
    """The loss, and its gradient (B, T) with respect to log_probs."""
    log_probs = log_probs.detach().clone().requires_grad_()
    result = loss_fn(log_probs, *rest)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    return loss.item(), log_probs.grad


def relative_error(measured: Tensor, expected: Tensor) -> float:
    return ((measured - expected).norm() / expected.norm()).item()


def importance_ratio() -> Checks:
    fault = (
        "sequence_importance_ratio: exp of the mean, not the sum, of log pi - log pi_old over the response"
    )
    log_probs, old, _, mask = example("grpo")
    measured = gspo.sequence_importance_ratio(log_probs.detach(), old, mask)
    expected = []
    for row, old_row, real in zip(log_probs, old, mask, strict=True):
        token_ratios = [math.exp(difference) for difference in (row - old_row)[real].tolist()]
        expected.append(math.prod(token_ratios) ** (1 / len(token_ratios)))
    error = relative_error(measured, torch.tensor(expected, dtype=torch.float64))
    yield at_most(
        "the ratio is the geometric mean of the token ratios", error, 1e-12, "relative error", fault
    )
    whole = mask.all(1)  # rows without padding, which can be repeated
    once = [x.detach()[whole] for x in (log_probs, old, mask)]
    twice = [x.repeat(1, 2) for x in once]
    error = relative_error(gspo.sequence_importance_ratio(*twice), gspo.sequence_importance_ratio(*once))
    name = "a response repeated twice has the same ratio (length normalised)"
    yield at_most(name, error, 1e-12, "relative error", fault)


def on_policy() -> Checks:
    figures = {}
    for algorithm in ALGORITHMS:
        log_probs, _, advantages, mask = example(algorithm, dtype=torch.float32)
        _, metrics = loss_of(algorithm)(log_probs, log_probs.detach(), advantages, mask)
        extremes = [metrics["importance_ratio_min"], metrics["importance_ratio_max"]]
        figures[algorithm] = max(abs(ratio - 1) for ratio in extremes) + metrics["clip_fraction"]
    yield each_at_most(
        "on policy the ratio is exactly 1 and nothing clips", figures, 0.0, "|ratio - 1| + clip fraction",
        "the loss's log pi - log pi_old",
    )  # fmt: skip


def value_and_gradient_match() -> Checks:
    values, gradients, fractions = {}, {}, {}
    for algorithm in ALGORITHMS:
        if not has_reference(algorithm):
            yield missing_reference(algorithm)
            continue
        inputs = example(algorithm, seed=1)
        ranges = ranges_of(algorithm)
        slow, fast = reference_of(algorithm), loss_of(algorithm)
        expected, expected_gradient = value_and_gradient(slow, *inputs, *ranges)
        value, gradient = value_and_gradient(fast, *inputs)  # with the ranges that are its defaults
        values[algorithm] = abs(value / expected - 1)
        gradients[algorithm] = relative_error(gradient, expected_gradient)
        share, expected_share = fast(*inputs)[1]["clip_fraction"], slow(*inputs, *ranges)[1]
        fractions[algorithm] = abs(share - expected_share)
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


def closed_form() -> Checks:
    log_probs, old, advantages, mask = inputs = example("gspo", seed=3)
    _, gradient = value_and_gradient(gspo.gspo_loss, *inputs)
    left, right = PAPER_CLIP_RANGES["gspo"]
    lengths = mask.sum(1)
    s = torch.exp(((log_probs - old) * mask).sum(1) / lengths).detach()
    clipped = ((advantages > 0) & (s > 1 + right)) | ((advantages < 0) & (s < 1 - left))
    # The gradient of a response, (B,), is the same at each of its tokens.
    by_response = torch.where(clipped, 0.0, -s * advantages / (lengths * len(mask)))
    yield at_most(
        "gspo: the gradient is the paper's closed form",
        relative_error(gradient, by_response[:, None] * mask), 1e-10,
        "relative error", "gspo_loss: -s A / (|y| B) at every token of a response that is not clipped",
    )  # fmt: skip
    directions = ["up" if _gradient_at("gspo", advantage, 1.0) < 0 else "down" for advantage in (1, -1)]
    yield exactly(
        "gspo: a step raises what was rewarded and lowers what was not", " ".join(directions), "up down",
        "likelihood", "gspo_loss: the sign of the loss",
    )  # fmt: skip


def gspo_token_agrees() -> Checks:
    inputs = example("gspo", seed=7)
    value, gradient = value_and_gradient(gspo.gspo_loss, *inputs)
    token_value, token_gradient = value_and_gradient(gspo.gspo_token_loss, *inputs)
    error = abs(token_value / value - 1) + relative_error(token_gradient, gradient)
    yield at_most(
        "gspo_token with one advantage per response is gspo", error, 1e-10, "relative error",
        "gspo_token_loss: sg[s] * pi / sg[pi]",
    )  # fmt: skip


def clipping_side() -> Checks:
    for algorithm, (left, right) in PAPER_CLIP_RANGES.items():
        above, below = 1 + 2 * right, 1 - 2 * left
        cases = ((1, above), (-1, below), (1, below), (-1, above), (-1, 50.0))
        measured = ["flows" if _gradient_at(algorithm, *case) else "stops" for case in cases]
        yield exactly(
            f"{algorithm}: clipping stops the gradient on the side it should", " ".join(measured),
            "stops stops flows flows flows", "A>0 above, A<0 below, A>0 below, A<0 above, far above:",
            f"{loss_of(algorithm).__name__}: min(w A, clip(w) A)",
        )  # fmt: skip


def _gradient_at(algorithm: str, advantage: float, ratio: float) -> float:
    """The loss's derivative with respect to a token's log-probability, for one response.

    All of its tokens have this importance ratio.
    """
    old, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    _, gradient = value_and_gradient(loss_of(algorithm), old + math.log(ratio), old, advantages, mask)
    return gradient[0, 0].item()


def clip_ranges() -> Checks:
    for algorithm, expected in PAPER_CLIP_RANGES.items():
        config = gspo.resolve(gspo.GSPOConfig(algorithm=algorithm), 10**9)
        of_loss = _edge(algorithm, -1), _edge(algorithm, 1)
        of_trainer = config.left_clip_range or math.nan, config.right_clip_range or math.nan
        pairs = zip(of_loss + of_trainer, expected + expected, strict=True)
        text = "loss: left {:.4g}, right {:.4g}; trainer: left {:.4g}, right {:.4g}"
        yield Check(
            f"{algorithm}: the clip ranges are the paper's",
            all(math.isclose(measured, paper, rel_tol=1e-6) for measured, paper in pairs),
            text.format(*of_loss, *of_trainer), text.format(*expected, *expected),
            f"the defaults of {loss_of(algorithm).__name__}, and the algorithm's entry in ALGORITHMS",
        )  # fmt: skip


def _edge(algorithm: str, sign: int) -> float:
    """How far from 1, on the side of the advantage's sign, the ratio may go before the gradient stops."""
    flows, stops = 0.0, 0.99
    for _ in range(50):
        middle = (flows + stops) / 2
        if _gradient_at(algorithm, sign, 1 + sign * middle):
            flows = middle
        else:
            stops = middle
    return flows


def sequence_mean() -> Checks:
    mask = torch.tensor([[True] * 9, [True] + [False] * 8])
    zeros = torch.zeros(2, 9, dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    errors = {}
    for algorithm in PAPER_CLIP_RANGES:
        value, gradient = value_and_gradient(loss_of(algorithm), zeros, zeros, advantages, mask)
        by_response = gradient.sum(1)  # (B,)
        errors[algorithm] = abs(value) + (by_response - torch.tensor([0.5, -0.5])).abs().max().item()
    yield each_at_most(
        "a long failure and a short success weigh the same", errors, 1e-12, "error",
        "a mean over the tokens of each sequence, then over sequences; not over all tokens",
    )  # fmt: skip


def padding() -> Checks:
    errors = {}
    for algorithm in ALGORITHMS:
        loss_fn = loss_of(algorithm)
        log_probs, old, advantages, mask = example(algorithm, seed=4)
        mask[3] = False  # a row without tokens
        value, gradient = value_and_gradient(loss_fn, log_probs, old, advantages, mask)
        junk = [torch.where(mask, x.detach(), math.nan) for x in (log_probs, old)]
        wider = [torch.nn.functional.pad(x, (0, 5), value=math.nan) for x in junk]
        wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
        wide_value, wide_gradient = value_and_gradient(loss_fn, *wider, advantages, wide_mask)
        errors[algorithm] = abs(wide_value / value - 1) + relative_error(wide_gradient[:, :-5], gradient)
    yield each_at_most(
        "padding never matters, NaN included", errors, 1e-12, "relative error",
        "the mask, in every sum and every count",
    )  # fmt: skip


def micro_batches() -> Checks:
    errors = {}
    for algorithm in ALGORITHMS:
        loss_fn, ranges = loss_of(algorithm), ranges_of(algorithm)
        inputs = example(algorithm, seed=8)
        value, gradient = value_and_gradient(loss_fn, *inputs)
        rows, denominator = len(gradient), denominator_of(algorithm, inputs[-1])
        errors[algorithm] = 0.0
        for size in (1, 2, 5):
            total, gradients = 0.0, []
            for start in range(0, rows, size):
                part = [x[start : start + size] for x in inputs]
                part_value, part_gradient = value_and_gradient(loss_fn, *part, *ranges, denominator)
                total += part_value
                gradients.append(part_gradient)
            errors[algorithm] += abs(total / value - 1) + relative_error(torch.cat(gradients), gradient)
    yield each_at_most(
        "micro-batches of 1, 2 or 5 add up to the whole", errors, 1e-12, "relative error", "the denominator"
    )


def old_policy_is_constant() -> Checks:
    errors = {}
    for algorithm in ALGORITHMS:
        loss_fn = loss_of(algorithm)
        log_probs, _, advantages, mask = example(algorithm, seed=1)
        _, expected = value_and_gradient(loss_fn, log_probs, log_probs.detach(), advantages, mask)
        log_probs = log_probs.detach().requires_grad_()
        loss, _ = loss_fn(log_probs, log_probs, advantages, mask)
        loss.backward()
        errors[algorithm] = relative_error(log_probs.grad, expected)
    yield each_at_most(
        "no gradient flows to the old policy", errors, 1e-12, "relative error", "old_log_probs detached"
    )


def overflow() -> Checks:
    infinite = dict.fromkeys(ALGORITHMS, 0.0)
    for algorithm in ALGORITHMS:
        for shift in (-1e4, -100.0, 100.0, 1e4):
            old = torch.full((2, 3), -1.0)
            advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool)
            value, gradient = value_and_gradient(loss_of(algorithm), old + shift, old, advantages, mask)
            infinite[algorithm] += not (math.isfinite(value) and gradient.isfinite().all())
    yield each_at_most(
        "log-ratios of 10,000 stay finite, and their gradients", infinite, 0, "not finite",
        "exp() of an unbounded log-ratio",
    )  # fmt: skip


def advantages() -> Checks:
    fault = "group_advantages: (r - mean) / (unbiased std + 1e-6) of each group, ties by max - min"
    ties = [gspo.group_advantages(torch.full((7,), r), 7).abs().max().item() for r in (0.1, 0.3, 0.7, 1 / 3)]
    yield exactly("equal rewards have advantages of exactly 0", max(ties), 0.0, "largest", fault)
    lone = [1.0] + [0.0] * 15  # the largest advantages there are
    rewards = [0.0, 1.0, 0.25, 1.0, None, 0.5, 0.5, 0.0, 0.3, 0.3, 0.3, 0.3, None, None, None, 1.0]
    given = [math.nan if r is None else r for r in rewards]
    measured = gspo.group_advantages(torch.tensor(given, dtype=torch.float64), 4)
    of_lone = gspo.group_advantages(torch.tensor(lone, dtype=torch.float64), 16)
    expected = reference.advantages(rewards, 4) + reference.advantages(lone, 16)
    error = relative_error(torch.cat([measured, of_lone]), torch.tensor(expected, dtype=torch.float64))
    name = "advantages are (r - mean) / std of the group's graded rewards"
    yield at_most(name, error, 1e-12, "relative error", fault)
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
