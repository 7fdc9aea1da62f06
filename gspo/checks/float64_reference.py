"""The paper's formulas as slow float64 loops, which share nothing with the code that they check.

Used by the tests and by validate_gspo.py. Shapes: B sequences, T response positions.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch


def loss(kind, log_probs, old_log_probs, advantages, mask, left, right):
    """Minus the objective of gspo (equation 5), gspo_token (13) or grpo (2); differentiable in log_probs.

    log_probs, old_log_probs (B, T) float64; advantages (B,) or (B, T); mask (B, T) bool.
    """
    total = 0.0 * log_probs[mask].sum()  # differentiable where everything is clipped, too
    for i in range(len(mask)):
        positions = [t for t in range(mask.shape[1]) if mask[i, t]]
        if not positions:
            continue
        ratio = sum(log_probs[i, t] - old_log_probs[i, t] for t in positions) / len(positions)
        s = torch.exp(ratio)
        terms = []
        for t in positions:
            a = advantages[i] if advantages.dim() == 1 else advantages[i, t]
            if kind == "gspo":
                w = s
            elif kind == "gspo_token":
                w = s.detach() * torch.exp(log_probs[i, t]) / torch.exp(log_probs[i, t]).detach()
            else:
                w = torch.exp(log_probs[i, t] - old_log_probs[i, t])
            clipped = min(max(w.item(), 1 - left), 1 + right)
            terms.append(w * a if (w * a).item() <= clipped * a.item() else clipped * a)
        total = total + sum(terms) / len(terms)
    return -total / len(mask)


def clip_fraction(kind, log_probs, old_log_probs, advantages, mask, left, right):
    """Share of tokens whose clipped branch is in force."""
    clipped = tokens = 0
    for i in range(len(mask)):
        positions = [t for t in range(mask.shape[1]) if mask[i, t]]
        differences = [(log_probs[i, t] - old_log_probs[i, t]).item() for t in positions]
        for difference, t in zip(differences, positions, strict=True):
            a = (advantages[i] if advantages.dim() == 1 else advantages[i, t]).item()
            w = math.exp(difference if kind == "grpo" else sum(differences) / len(differences))
            clipped += (a > 0 and w > 1 + right) or (a < 0 and w < 1 - left)
            tokens += 1
    return clipped / tokens


def advantages(rewards, group_size):
    """Plain lists of floats; None: not judged."""
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        judged = [r for r in group if r is not None]
        if len(judged) < 2 or max(judged) == min(judged):
            result += [0.0] * group_size
            continue
        mean = sum(judged) / len(judged)
        std = math.sqrt(sum((r - mean) ** 2 for r in judged) / (len(judged) - 1))
        result += [0.0 if r is None else (r - mean) / (std + 1e-6) for r in group]
    return result


def token_log_probs(model, prompt, response, temperature=1.0):
    """One row without padding, the full logits, one float64 log-softmax a token: (len(response),)."""
    ids = torch.tensor([[*prompt, *response]], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids).logits[0].double() / temperature
    return torch.stack(
        [logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(response)]
    )


@dataclass
class Updates:
    """What a rollout batch's optimizer updates came to. B responses, those without tokens included."""

    model: torch.nn.Module  # after them, float64
    advantages: list[float]  # of each response
    old_log_probs: list[torch.Tensor]  # (|y|,) of each response, before the first update
    log_ratios: list[torch.Tensor]  # (|y|,) log pi - log pi_old as each response's own update saw them
    clip_fractions: list[float]  # of the tokens of each update
    num_tokens: list[int]  # of each update
    grad_norms: list[float]  # of each update, before clipping


def updates(
    model: torch.nn.Module,
    kind: str,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    rewards: Sequence[float | None],
    group_size: int,
    num_updates: int,
    ranges: tuple[float, float],
    learning_rate: float,
    max_grad_norm: float,
    temperature: float,
) -> Updates:
    """The optimizer updates of one rollout batch on a float64 copy of the model, with a fresh AdamW.

    pairs: (prompt ids, response ids) of the B responses, groups contiguous; update k of num_updates takes the
    k-th equal share of them.
    """
    model = deepcopy(model).double()
    model.set_experts_implementation("eager")  # of a mixture of experts; the others have no float64
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    with torch.no_grad():
        old = [token_log_probs(model, *pair, temperature) for pair in pairs]
    weights = torch.tensor(advantages(rewards, group_size), dtype=torch.float64)
    result = Updates(model, weights.tolist(), old, [], [], [], [])
    size = len(pairs) // num_updates
    for start in range(0, len(pairs), size):
        rows = range(start, start + size)
        scored = [token_log_probs(model, *pairs[i], temperature) for i in rows]
        width = max(len(row) for row in scored)
        mask = torch.tensor([[t < len(row) for t in range(width)] for row in scored])
        padded = [
            torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows_of]).cpu()
            for rows_of in (scored, [old[i] for i in rows])
        ]
        inputs = (*padded, weights[rows.start : rows.stop], mask, *ranges)
        optimizer.zero_grad()
        loss(kind, *inputs).backward()
        result.grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        result.clip_fractions.append(clip_fraction(kind, *inputs))
        result.num_tokens.append(int(mask.sum()))
        result.log_ratios += [(row - old[i]).detach() for row, i in zip(scored, rows, strict=True)]
        optimizer.step()
    return result
