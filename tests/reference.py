"""Slow float64 references, one Python loop at a time, sharing nothing with the code under test."""

import math

import torch


def loss(kind, log_probs, old_log_probs, advantages, mask, left, right):
    """gspo, gspo_token or grpo, as PAPER's formulas read; differentiable in log_probs (float64)."""
    total = torch.zeros((), dtype=torch.float64)
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
    """One row without padding, the full logits, one float64 log-softmax a token."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0].double() / temperature
    return torch.stack(
        [logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(response)]
    )
