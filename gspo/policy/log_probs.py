"""Token log-probabilities of responses under a causal language model, the one quantity that GSPO needs.

    log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t],   t = 1 .. |y|        (float32)

How it is fast: a pass is one packed row, in which each prompt stands once and nothing is padded
(group_attention.py). The output layer sees response positions only, a chunk at a time, and makes its logits
anew in backward: memory does not grow with vocabulary x tokens.

Models whose tokens meet elsewhere than in plain attention get right-padded rows of prompt and response.
Causality alone keeps padding out of every real position: no attention mask is built, positions count from 0,
and the result does not depend on the tokenizer's padding side.

Shapes: B sequences, S positions of prompt and response, N response tokens of all rows together, n of a chunk,
H hidden width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gspo.policy.group_attention import PackedGroups, attending_in, can_pack

# Tokens of one forward pass. Bounds activations when a caller hands over a large batch; the trainer cuts its
# micro-batches smaller than this.
MAX_FORWARD_TOKENS = 16384
# Logits held at a time: in float32, with their softmax and its gradient, 400 MB.
MAX_LOGITS = 1 << 25


def token_log_probs(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """log pi(y_t | x, y_<t) in nats for every response token; differentiable where gradients are enabled.

    Args:
        model: any decoder that transformers loads with an output embedding; its mode is used as found.
        prompts, responses: token ids of each row, without padding. A prompt needs at least one token; a
            response may be empty.
        temperature: the sampling temperature; scoring uses the distribution that was sampled.

    Returns:
        One float32 tensor (len(response),) a row, in the rows' order.

    Raises:
        ValueError: unequal numbers of rows, an empty prompt, a temperature that is not positive, or a row
            longer than the model's positions.
    """
    _check_rows(model, prompts, responses, temperature)
    scored: list[torch.Tensor | None] = [None] * len(prompts)
    for rows in micro_batches(model, prompts, responses, MAX_FORWARD_TOKENS):
        batch = _score_rows(model, [prompts[i] for i in rows], [responses[i] for i in rows], temperature)
        for i, log_probs in zip(rows, batch, strict=True):
            scored[i] = log_probs
    return scored


def micro_batches(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[list[int]]:
    """Split rows into forward passes of at most max_tokens tokens, at least one row each.

    The split depends on the rows alone: scoring them again runs the same shapes, which makes the importance
    ratio of an unchanged policy exactly 1.
    """
    split = _split_packed if can_pack(model) else _split_padded
    return split(prompts, responses, max_tokens)


def _split_packed(prompts, responses, max_tokens) -> list[list[int]]:
    """The rows of a prompt stay together, and count its tokens once."""
    first = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(tuple(prompt), i)
    batches, tokens, seen = [], max_tokens, None
    for i in sorted(range(len(prompts)), key=lambda i: first[tuple(prompts[i])]):
        group = first[tuple(prompts[i])]
        tokens += len(responses[i]) + (len(prompts[i]) if group != seen else 0)
        if tokens > max_tokens:
            batches.append([])
            tokens = len(responses[i]) + len(prompts[i])
        batches[-1].append(i)
        seen = group
    return batches


def _split_padded(prompts, responses, max_tokens) -> list[list[int]]:
    """Sorted by length, so that a pass holds rows of similar length and little padding."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _check_rows(model, prompts, responses, temperature) -> None:
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses: one prompt a response")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to score under, got {temperature}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens: the first response token would have no context")
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(f"a row of {longest} tokens exceeds the model's {positions} positions")


def _score_rows(model, prompts, responses, temperature) -> list[torch.Tensor]:
    """One pass over rows."""
    device = model.get_input_embeddings().weight.device
    lengths = [len(response) for response in responses]
    if not any(lengths):
        return [torch.zeros(0, device=device) for _ in responses]
    run = _run_packed if can_pack(model) else _run_padded
    output, places = run(model, prompts, responses, device)
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, torch.tensor(places, device=device))
    targets = torch.tensor([token for response in responses for token in response], device=device)
    step = max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    chunks = [
        (model, output, *chunk, temperature)
        for chunk in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    # the last chunk's logits are kept: backward begins with it, and would make them again at once
    log_probs = [checkpoint(_log_probs, *chunk, use_reentrant=False) for chunk in chunks[:-1]]
    return list(torch.cat([*log_probs, _log_probs(*chunks[-1])]).split(lengths))


def _run_packed(model, prompts, responses, device):
    """The model's body over a packed row: its output, and the places (N,) that predict response tokens."""
    rows_of: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(i)
    # a response's last token predicts nothing
    packed = PackedGroups(
        [(prompt, [responses[i][:-1] for i in rows]) for prompt, rows in rows_of.items()], device
    )
    with attending_in(model, packed):
        output = _body(model)(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False)
    order = [i for rows in rows_of.values() for i in rows]
    predictors = dict(zip(order, (p for group in packed.predictors for p in group), strict=True))
    return output, [place for i, row in enumerate(responses) for place in predictors[i][: len(row)]]


def _run_padded(model, prompts, responses, device):
    """The same over rows (B, S) of prompt and response, with places in the flattened (B * S,)."""
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    output = _body(model)(input_ids=input_ids, use_cache=False)
    places = [
        i * width + len(prompt) - 1 + t
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        for t in range(len(response))
    ]
    return output, places


def _log_probs(model, output, hidden, targets, temperature) -> torch.Tensor:
    """Of the targets (n,), from the hidden states (n, H) that predict them, in float32."""
    with _body_returning(model, output, hidden[None]):
        logits = model(input_ids=targets[None], use_cache=False).logits[0]  # (n, V)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


def _body(model) -> torch.nn.Module:
    """The part of the model before its output layer."""
    parts = model.get_decoder(), model.base_model, getattr(model, "model", None)
    return next(part for part in parts if part is not None and part is not model)


@contextmanager
def _body_returning(model, output, hidden: torch.Tensor):
    """Within it, the model's body returns its output with other hidden states (1, n, H) and computes nothing.

    The model then applies its output layer and whatever it does to its logits afterwards (Gemma's soft cap,
    Granite's scaling), which calling the output layer by hand would miss.
    """
    body, calls = _body(model), []
    stand_in = type(output)(**{**output, "last_hidden_state": hidden})
    body.forward = lambda *_args, **_kwargs: calls.append(1) or stand_in
    try:
        yield
    finally:
        del body.forward
    assert calls, f"{type(model).__name__} does not run its decoder as a part"
