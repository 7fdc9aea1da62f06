"""The papers' formulas as slow float64 loops, which share nothing with the code that they check.

The tests and validate_gspo.py use them. An entry of ALGORITHMS in gspo_implementation.py names its loss here
in its field `reference`. A new loss needs a function like `gspo` below.

Shapes: B sequences, T response positions, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A loss takes log_probs (B, T), old_log_probs (B, T), advantages (B,) or (B, T), mask (B, T) bool, and the
# left and right clip range, None where it has none. It returns minus the objective, differentiable in
# log_probs, and the share of tokens that are clipped, which mostly means that they have no gradient.
Loss = Callable[..., tuple[Tensor, float]]
# The log-probabilities of a response's tokens, new and old, to the importance ratio of each token.
Ratios = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def gspo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: float, right: float
) -> tuple[Tensor, float]:
    """GSPO (equation 5). Every token of a response has the response's own ratio s (equation 7)."""

    def ratios(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        return [_sequence_ratio(new, old)] * len(new)

    return _clipped_surrogate(ratios, log_probs, old_log_probs, advantages, mask, left, right)


def gspo_token(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: float, right: float
) -> tuple[Tensor, float]:
    """GSPO-token (equations 13 and 14). The ratio of a token is sg[s] pi / sg[pi]."""

    def ratios(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        s = _sequence_ratio(new, old).detach()
        return [s * torch.exp(p) / torch.exp(p).detach() for p in new]

    return _clipped_surrogate(ratios, log_probs, old_log_probs, advantages, mask, left, right)


def grpo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: float, right: float
) -> tuple[Tensor, float]:
    """GRPO (equation 2). The ratio of a token is pi / pi_old."""

    def ratios(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        return [torch.exp(p - q) for p, q in zip(new, old, strict=True)]

    return _clipped_surrogate(ratios, log_probs, old_log_probs, advantages, mask, left, right)


def sapo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: None, right: None
) -> tuple[Tensor, float]:
    """SAPO (arXiv 2511.20347): a mean over each response's tokens, then over responses. Nothing clips."""
    total = 0.0
    for response in _responses(log_probs, old_log_probs, advantages, mask):
        for p, q, a in response:
            tau = 1.0 if a > 0 else 1.05
            gate = 4 / tau / (1 + torch.exp(-tau * (torch.exp(p - q) - 1)))
            total = total + gate * a / len(response)
    return -total / len(mask), 0.0


def cispo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: None, right: float
) -> tuple[Tensor, float]:
    """CISPO (arXiv 2506.13585): a mean over all tokens. A token whose weight is capped counts as clipped."""
    total, num_clipped, num_tokens = 0.0, 0, 0
    for response in _responses(log_probs, old_log_probs, advantages, mask):
        for p, q, a in response:
            w = math.exp(p.item() - q.item())
            total = total + min(w, 1 + right) * a * p
            num_clipped += w > 1 + right and a != 0
            num_tokens += 1
    return -total / num_tokens, num_clipped / num_tokens


def dppo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, left: float, right: float
) -> tuple[Tensor, float]:
    """DPPO with the binary total variation (arXiv 2602.04879): a mean over all tokens."""
    total, num_clipped, num_tokens = 0.0 * log_probs[mask].sum(), 0, 0
    for response in _responses(log_probs, old_log_probs, advantages, mask):
        for p, q, a in response:
            risen = math.exp(p.item()) - math.exp(q.item())
            is_clipped = (a > 0 and risen > right) or (a < 0 and -risen > left)
            total = total + (0.0 if is_clipped else torch.exp(p - q) * a)
            num_clipped += is_clipped
            num_tokens += 1
    return -total / num_tokens, num_clipped / num_tokens


def _responses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
) -> list[list[tuple[Tensor, Tensor, float]]]:
    """For each response its tokens, and for each of them log pi, log pi_old and the advantage."""
    of_tokens = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
    return [
        [(log_probs[i, t], old_log_probs[i, t], of_tokens[i, t].item()) for t in range(len(row)) if row[t]]
        for i, row in enumerate(mask)
    ]


def _sequence_ratio(new: list[Tensor], old: list[Tensor]) -> Tensor:
    differences = [p - q for p, q in zip(new, old, strict=True)]
    return torch.exp(sum(differences) / len(differences))


def _clipped_surrogate(
    ratios_of: Ratios,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    left: float,
    right: float,
) -> tuple[Tensor, float]:
    """Minus the mean of min(w A, clip(w) A) over each response's tokens and then over responses."""
    total = 0.0 * log_probs[mask].sum()  # differentiable even where every token is clipped
    num_tokens = num_clipped = 0
    for i in range(len(mask)):
        positions = [t for t in range(mask.shape[1]) if mask[i, t]]
        if not positions:
            continue
        new = [log_probs[i, t] for t in positions]
        old = [old_log_probs[i, t] for t in positions]
        terms = []
        for w, t in zip(ratios_of(new, old), positions, strict=True):
            a = advantages[i].item() if advantages.dim() == 1 else advantages[i, t].item()
            clipped_w = min(max(w.item(), 1 - left), 1 + right)
            terms.append(w * a if w.item() * a <= clipped_w * a else clipped_w * a)
            num_clipped += (a > 0 and w.item() > 1 + right) or (a < 0 and w.item() < 1 - left)
            num_tokens += 1
        total = total + sum(terms) / len(terms)
    return -total / len(mask), num_clipped / num_tokens


def advantages(rewards: Sequence[float | None], group_size: int) -> list[float]:
    """The advantage of each reward in its group; a reward of None (not graded) has the advantage 0."""
    result: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        graded = [r for r in group if r is not None]
        if len(graded) < 2 or max(graded) == min(graded):
            result += [0.0] * group_size
            continue
        mean = sum(graded) / len(graded)
        std = math.sqrt(sum((r - mean) ** 2 for r in graded) / (len(graded) - 1))
        result += [0.0 if r is None else (r - mean) / (std + 1e-6) for r in group]
    return result


def token_log_probs(
    model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (len(response),) in float64, from one row without padding and with all its logits."""
    ids = torch.tensor([[*prompt, *response]], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids).logits[0].double() / temperature  # (S, V)
    # The logits at a position are those of the token after it.
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)  # (T, V)
    return log_probs[range(len(response)), list(response)]


@dataclass
class Updates:
    """The result of one rollout batch's optimizer updates, for all B responses, with tokens or without."""

    model: torch.nn.Module  # after the updates, float64
    advantages: list[float]  # of each response
    old_log_probs: list[Tensor]  # (|y|,) for each response, before the first update
    log_ratios: list[Tensor]  # (|y|,) log pi - log pi_old for each response, in its own update; 0 if in none
    can_clip: list[bool]  # for each response: it has an advantage, and is in an update after the first
    clip_fractions: list[float]  # share of tokens, for each update
    num_tokens: list[int]  # for each update
    grad_norms: list[float]  # for each update, before the gradient is clipped


def updates(
    model: torch.nn.Module,
    loss: Loss,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    rewards: Sequence[float | None],
    group_size: int,
    num_updates: int,
    ranges: tuple[float | None, float | None],
    learning_rate: float,
    max_grad_norm: float,
    temperature: float,
) -> Updates:
    """Make the optimizer updates of one rollout batch on a float64 copy of the model, with a fresh AdamW.

    pairs: (prompt ids, response ids) of the B responses, groups contiguous. The groups with an advantage are
    dealt evenly over the updates, in order; an update without a group or a gradient is not made.
    """
    model = deepcopy(model).double()
    # The other implementations of a mixture of experts have no float64.
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    with torch.no_grad():
        old = [token_log_probs(model, *pair, temperature) for pair in pairs]
    weights = torch.tensor(advantages(rewards, group_size), dtype=torch.float64)
    unmoved = [torch.zeros_like(row) for row in old]
    result = Updates(model, weights.tolist(), old, unmoved, [False] * len(pairs), [], [], [])
    starts = range(0, len(pairs), group_size)
    with_signal = [start for start in starts if weights[start : start + group_size].any()]
    for dealt in np.array_split(with_signal, num_updates):
        rows = [start + i for start in map(int, dealt) for i in range(group_size)]
        if not rows:
            continue
        new = [token_log_probs(model, *pairs[i], temperature) for i in rows]
        width = max(len(row) for row in new)
        mask = torch.tensor([[t < len(row) for t in range(width)] for row in new])
        new_padded = _padded(new, width)
        old_padded = _padded([old[i] for i in rows], width)
        value, clip_fraction = loss(new_padded, old_padded, weights[rows], mask, *ranges)
        optimizer.zero_grad()
        value.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if grad_norm > 0:
            optimizer.step()
        result.grad_norms.append(grad_norm.item())
        result.clip_fractions.append(clip_fraction)
        result.num_tokens.append(int(mask.sum()))
        for row, i in zip(new, rows, strict=True):
            result.log_ratios[i] = (row - old[i]).detach()
            result.can_clip[i] = weights[i].item() != 0 and len(result.grad_norms) > 1
    return result


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """(B, width) on the CPU, with zeros behind each row."""
    return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows]).cpu()
