"""Token log-probabilities of responses under a causal language model, the one quantity that GSPO needs.

    log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t],   t = 1 .. |y|        (float32)

How it is fast: a prompt that several rows share runs once, and its responses attend to its keys and values
(prompt_cache.py); gradients meet there, so that this is exact, to rounding. Logits are computed at response
positions only (the output layer of a 49k to 152k vocabulary is a fifth of a small model's arithmetic, and its
full (B, S, V) output is what usually exhausts memory).

Rows by themselves are right-padded, so causality alone keeps padding out of every real position: no attention
mask is built, positions count from 0, and the result does not depend on the tokenizer's padding side.

Shapes: B sequences, Q distinct prompts of P positions, T response positions, S positions of prompt and
response, N response tokens of all rows together, H hidden width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from prompt_cache import can_share_prompts, run_prompts

# Padded tokens of one forward pass. Bounds activations and logits when a caller hands over a large batch;
# the trainer cuts its micro-batches smaller than this.
MAX_FORWARD_TOKENS = 16384


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
    for rows in micro_batches(prompts, responses, MAX_FORWARD_TOKENS):
        batch = _score_rows(model, [prompts[i] for i in rows], [responses[i] for i in rows], temperature)
        for i, log_probs in zip(rows, batch, strict=True):
            scored[i] = log_probs
    return scored


def micro_batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], max_tokens: int
) -> list[list[int]]:
    """Split rows into forward passes of at most max_tokens padded tokens, at least one row each.

    Rows are sorted by length first, so that a pass holds rows of similar length and little padding. The
    split depends on lengths alone: scoring the same rows again runs the same shapes, which makes the
    importance ratio of an unchanged policy exactly 1.
    """
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
    """One pass over rows: each prompt once where that can be, else every row by itself."""
    if not any(responses):
        return [torch.zeros(0, device=model.get_input_embeddings().weight.device) for _ in responses]
    shared = sorted({tuple(prompt) for prompt in prompts})
    if len(shared) < len(prompts) and can_share_prompts(model) and not _recomputes(model):
        return _score_after_shared_prompts(model, shared, prompts, responses, temperature)
    return _score_whole_rows(model, prompts, responses, temperature)


def _score_after_shared_prompts(model, shared, prompts, responses, temperature) -> list[torch.Tensor]:
    """The distinct prompts (Q, P) once, then the responses (B, T) on their keys and values."""
    logits, cache, prompt_mask = run_prompts(model, shared)
    device, lengths = logits.device, [len(response) for response in responses]
    place = {prompt: i for i, prompt in enumerate(shared)}
    prompt_of = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    nonempty = torch.tensor([n > 0 for n in lengths], device=device)
    first_tokens = torch.tensor([response[0] for response in responses if response], device=device)
    firsts = _log_probs(logits[prompt_of[nonempty]], first_tokens, temperature)

    inputs = [response[:-1] for response in responses]  # the last token predicts nothing
    input_ids, predicts = _right_padded(inputs, device)  # (B, T - 1)
    rest = firsts.new_zeros(0)
    if input_ids.numel():
        cache.batch_select_indices(prompt_of)
        mask = prompt_mask[prompt_of]  # (B, P)
        with _output_layer_at(model, predicts):
            logits = model(
                input_ids=input_ids,
                attention_mask=torch.cat([mask, torch.ones_like(input_ids)], dim=1),
                position_ids=mask.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=device),
                past_key_values=cache,
                use_cache=True,
            ).logits  # (1, N - B, V)
        rest = _log_probs(logits[0], _joined([response[1:] for response in responses], device), temperature)

    firsts_of_rows, rests = iter(firsts.split(1)), rest.split([len(row) for row in inputs])
    return [
        torch.cat([next(firsts_of_rows), row]) if n else row for n, row in zip(lengths, rests, strict=True)
    ]


def _score_whole_rows(model, prompts, responses, temperature) -> list[torch.Tensor]:
    """Right-padded rows of prompt and response (B, S)."""
    device = model.get_input_embeddings().weight.device
    input_ids, _ = _right_padded([[*p, *r] for p, r in zip(prompts, responses, strict=True)], device)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        predicts[i, len(prompt) - 1 : len(prompt) - 1 + len(response)] = True
    with _output_layer_at(model, predicts):
        logits = model(input_ids=input_ids, use_cache=False).logits  # (1, N, V)
    lengths = [len(response) for response in responses]
    return list(_log_probs(logits[0], _joined(responses, device), temperature).split(lengths))


def _right_padded(rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S), and whether each is a row's own; no real position attends to the padding."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    own = torch.arange(input_ids.shape[1]) < lengths[:, None]
    input_ids[own] = _joined(rows, "cpu")
    return input_ids.to(device), own.to(device)


def _joined(rows, device) -> torch.Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long, device=device)


def _log_probs(logits, targets, temperature) -> torch.Tensor:
    """Of the targets (N,) under logits (N, V), in float32."""
    return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")


def _recomputes(model) -> bool:
    """Gradient checkpointing runs layers again in backward, and then has no cache."""
    return any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    )


@contextmanager
def _output_layer_at(model, positions: torch.Tensor):
    """Within it, the output layer sees the hidden states at positions (B, S) only, as one row (1, N, H).

    A hook on the layer's input leaves whatever the model does to its logits afterwards (Gemma's soft cap,
    Granite's scaling) in place, which calling the output layer by hand would miss.
    """

    def keep_positions(_layer, inputs):
        return (inputs[0][positions].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_positions)
    try:
        yield
    finally:
        handle.remove()
