"""Token log-probabilities of responses under a causal language model, the one quantity that GSPO needs.

    log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t],   t = 1 .. |y|        (float32)

Rows are right-padded, so causality alone keeps padding out of every real position: no attention mask is
built, positions count from 0, and the result does not depend on the tokenizer's padding side. Logits are
computed at response positions only (the output layer of a 49k to 152k vocabulary is a fifth of a small
model's arithmetic, and its full (B, S, V) output is what usually exhausts memory).

Shapes: B sequences, S positions of the padded prompt + response, N response tokens of all rows together,
H hidden width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F

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
    """One forward pass over right-padded rows."""
    device = model.get_input_embeddings().weight.device
    lengths = [len(response) for response in responses]
    if sum(lengths) == 0:
        return [torch.zeros(0, device=device) for _ in responses]

    width = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, S); the pad id 0 is never attended
    predicts_response = torch.zeros(len(prompts), width, dtype=torch.bool)  # (B, S)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        predicts_response[i, len(prompt) - 1 : len(prompt) - 1 + len(response)] = True
    targets = torch.tensor([token for response in responses for token in response], device=device)  # (N,)

    with _output_layer_at(model, predicts_response.to(device)):
        logits = model(input_ids=input_ids.to(device), use_cache=False).logits  # (1, N, V)
    log_probs = -F.cross_entropy(logits[0].float() / temperature, targets, reduction="none")  # (N,)
    return list(log_probs.split(lengths))


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
