"""Token log-probabilities of responses under a causal language model.

    log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t],   t = 1 .. |y|        (float32)

Two things make it fast:

1. A forward pass takes one packed row, in which each prompt stands once and nothing is padded
   (group_attention.py).
2. The output layer is applied at response positions only, one chunk of them at a time. Its logits are
   recomputed in backward, so that memory does not grow with vocabulary x tokens.

A model that cannot take a packed row (can_pack() says which) gets right-padded rows of prompt and response.
A causal model never looks at the padding behind a token, so these rows need no attention mask, positions
count from 0, and the result does not depend on the tokenizer's padding side.

Shapes: B sequences, S positions of prompt and response, N response tokens of all rows together, n response
tokens of a chunk, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gspo.policy.expert_routing import Routing
from gspo.policy.group_attention import can_pack, packed_attention
from gspo.policy.packed_rows import PackedGroups
from gspo.policy.planned_device import gpu_bytes

# The most tokens of one forward pass. It bounds the activations when a caller hands over a large batch; the
# trainer cuts its micro-batches smaller than this.
MAX_FORWARD_TOKENS = 16384
# The most logits held at a time on a CPU: in float32, with their softmax and its gradient, they take 400 MB.
MAX_LOGITS = 1 << 25
# On a GPU, logits with their softmax and its gradient may take this share of its memory. Each chunk casts the
# output layer's weights (2.2 GB read and 1.1 GB written at a vocabulary of 152,000 and a width of 3584), and
# its backward adds to their gradient, so chunks must be large.
LOGIT_MEMORY_SHARE = 1 / 16
LOGIT_BYTES = 12  # per logit: itself, its softmax and its gradient in float32

# Token ids of each row, prompts or responses.
TokenRows = Sequence[Sequence[int]]
# Routes the experts of a forward pass: what Routing.one_pass() is, once it knows the rows of the pass.
Route = Callable[[Sequence[Sequence[int]], int, torch.device], AbstractContextManager]


def token_log_probs(
    model: torch.nn.Module,
    prompts: TokenRows,
    responses: TokenRows,
    temperature: float = 1.0,
    routing: Routing | None = None,
) -> list[torch.Tensor]:
    """Return log pi(y_t | x, y_<t) in nats for every response token, differentiable by the model's weights.

    Args:
        model: any decoder that transformers loads with an output embedding. It stays in the mode (training or
            evaluation) that it is in.
        prompts, responses: token ids of each row, without padding. A prompt needs at least one token; a
            response may be empty.
        temperature: the temperature that the responses were sampled at. The log-probabilities are those of
            the distribution that was sampled from.
        routing: records, compares or replays the experts of a mixture's tokens; None: nothing of that.

    Returns:
        One float32 tensor (len(response),) per row, in the order of the rows.

    Raises:
        ValueError: the numbers of prompts and responses differ, a prompt is empty, the temperature is not
            positive, a row is longer than the model's positions, or its routing is unknown (UnknownRouting).
    """
    _check_rows(model, prompts, responses, temperature)
    log_probs = [torch.empty(0)] * len(prompts)
    for rows in micro_batches(model, prompts, responses, MAX_FORWARD_TOKENS):
        row_prompts = [prompts[i] for i in rows]
        row_responses = [responses[i] for i in rows]
        route: Route = _no_routing
        if routing is not None:
            route = partial(routing.one_pass, rows, list(map(len, row_prompts)))
        of_rows = _micro_batch_log_probs(model, row_prompts, row_responses, temperature, route)
        for i, row_log_probs in zip(rows, of_rows, strict=True):
            log_probs[i] = row_log_probs
    return log_probs


def micro_batches(
    model: torch.nn.Module, prompts: TokenRows, responses: TokenRows, max_tokens: int
) -> list[list[int]]:
    """Split rows into forward passes of at most max_tokens tokens, but of one row at least.

    The split depends on the rows alone. The same rows therefore always go through forward passes of the same
    shapes, which makes the importance ratio of an unchanged policy exactly 1.

    Returns:
        The indices of the rows of each forward pass.
    """
    if can_pack(model):
        return _split_packed(prompts, responses, max_tokens)
    return _split_padded(prompts, responses, max_tokens)


def logit_tokens(vocabulary: int, gpu_bytes: float | None) -> int:
    """Return for how many tokens logits are computed at a time.

    It depends on the hardware alone and not on how much memory is free at the moment. The pass without
    gradients, the update and a resumed run therefore have chunks of the same shapes, which makes the
    importance ratio of an unchanged policy exactly 1.

    Args:
        vocabulary: logits per token.
        gpu_bytes: the memory of the GPU; None: not a GPU.
    """
    if gpu_bytes is None:
        return max(1, MAX_LOGITS // vocabulary)
    fitting = int(gpu_bytes * LOGIT_MEMORY_SHARE / (LOGIT_BYTES * vocabulary))
    return min(max(fitting, 256), 4096)


def _split_packed(prompts: TokenRows, responses: TokenRows, max_tokens: int) -> list[list[int]]:
    """Split so that rows with the same prompt, which share its tokens, stay together where they fit."""
    groups = _rows_by_prompt(prompts)
    batches: list[list[int]] = []
    batch_tokens = max_tokens  # the first row opens a batch
    for prompt, rows in groups.items():
        prompt_is_new = True  # to the batch in progress
        for i in rows:
            batch_tokens += len(responses[i])
            if prompt_is_new:
                batch_tokens += len(prompt)
            if batch_tokens > max_tokens:
                batches.append([])
                batch_tokens = len(prompt) + len(responses[i])
            batches[-1].append(i)
            prompt_is_new = False
    return batches


def _split_padded(prompts: TokenRows, responses: TokenRows, max_tokens: int) -> list[list[int]]:
    """Split rows in the order of their lengths, so that a forward pass has little padding."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in longest_first:
        # The first row of a batch is its longest, to whose length the others are padded.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _rows_by_prompt(prompts: TokenRows) -> dict[tuple[int, ...], list[int]]:
    """Return the indices of the rows that each distinct prompt has, in the order of first appearance."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(i)
    return rows


def _check_rows(model: torch.nn.Module, prompts: TokenRows, responses: TokenRows, temperature: float) -> None:
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts but {len(responses)} responses: pass one prompt per response"
        )
    if not temperature > 0:
        raise ValueError(f"log-probabilities need a positive temperature, got {temperature}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens: the first response token would have no context")
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(lengths, default=0)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(f"a row of {longest} tokens exceeds the model's {positions} positions")


def _micro_batch_log_probs(
    model: torch.nn.Module, prompts: TokenRows, responses: TokenRows, temperature: float, route: Route
) -> list[torch.Tensor]:
    """Return the log-probabilities (len(response),) of each row, from one forward pass."""
    device = model.get_input_embeddings().weight.device
    lengths = [len(response) for response in responses]
    if not any(lengths):
        # A pass is made all the same: with sharded weights other processes wait for it, here and in backward.
        nothing = _micro_batch_log_probs(model, [[0]], [[0]], temperature, _no_routing)[0][:0]
        return [nothing for _ in responses]
    decoder_pass = _packed_pass if can_pack(model) else _padded_pass
    output, predictors = decoder_pass(model, prompts, responses, device, route)
    hidden = output.last_hidden_state.flatten(0, 1)
    indices = torch.tensor([i for of_row in predictors for i in of_row], device=device)  # (N,)
    hidden = hidden.index_select(0, indices)  # (N, H)
    targets = torch.tensor([token for response in responses for token in response], device=device)  # (N,)

    chunk_size = logit_tokens(model.get_output_embeddings().weight.shape[0], gpu_bytes(device))
    hidden_chunks, target_chunks = hidden.split(chunk_size), targets.split(chunk_size)
    log_probs = [
        checkpoint(_target_log_probs, model, output, *chunk, temperature, use_reentrant=False)
        for chunk in zip(hidden_chunks[:-1], target_chunks[:-1], strict=True)
    ]
    # The last chunk keeps its logits: backward begins with it and would recompute them at once.
    log_probs.append(_target_log_probs(model, output, hidden_chunks[-1], target_chunks[-1], temperature))
    return list(torch.cat(log_probs).split(lengths))


def _no_routing(*_: Any) -> AbstractContextManager:
    return nullcontext()


def _packed_pass(
    model: torch.nn.Module, prompts: TokenRows, responses: TokenRows, device: torch.device, route: Route
) -> tuple[Any, list[list[int]]]:
    """Send one packed row through the decoder.

    Returns:
        The decoder's output, and for each row indices into the packed row: whose hidden states predict its
        response's tokens.
    """
    rows_by_prompt = _rows_by_prompt(prompts)
    groups = []
    for prompt, rows in rows_by_prompt.items():
        # A response's last token predicts nothing, so it need not be computed.
        groups.append((prompt, [responses[i][:-1] for i in rows]))
    packed = PackedGroups(groups, device)
    predictors_of_row: dict[int, list[int]] = {}
    for rows, group_predictors in zip(rows_by_prompt.values(), packed.predictors, strict=True):
        predictors_of_row.update(zip(rows, group_predictors, strict=True))
    # An empty response has the prompt's last token as its one predictor, but nothing to predict.
    predictors = [predictors_of_row[i][: len(response)] for i, response in enumerate(responses)]
    with packed_attention(model, packed), route(predictors, packed.input_ids.numel(), device):
        output = _decoder(model)(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
        )
    return output, predictors


def _padded_pass(
    model: torch.nn.Module, prompts: TokenRows, responses: TokenRows, device: torch.device, route: Route
) -> tuple[Any, list[list[int]]]:
    """Send right-padded rows (B, S) through the decoder.

    Returns:
        The decoder's output, and for each row indices into the flattened rows (B * S,): whose hidden states
        predict its response's tokens.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    predictors = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first = i * width + len(prompt) - 1  # the prompt's last token predicts the first response token
        predictors.append(list(range(first, first + len(response))))
    with route(predictors, len(rows) * width, device):
        output = _decoder(model)(input_ids=torch.tensor(padded, device=device), use_cache=False)
    return output, predictors


def _target_log_probs(
    model: torch.nn.Module, output: Any, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return float32 log-probabilities (n,) of targets (n,), given the hidden states (n, H) before them.

    Args:
        output: the decoder's output, from which the hidden states were taken.
    """
    with _decoder_returning(model, output, hidden[None]):
        logits = model(input_ids=targets[None], use_cache=False).logits[0]  # (n, V)
    logits = logits.float()  # before the softmax, whose sum over the vocabulary bfloat16 cannot hold
    if temperature != 1:
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part of the model before its output layer."""
    candidates = model.get_decoder(), model.base_model, getattr(model, "model", None)
    return next(part for part in candidates if part is not None and part is not model)


@contextmanager
def _decoder_returning(model: torch.nn.Module, output: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Make the model's decoder compute nothing and return `output` with other hidden states (1, n, H).

    The model then applies its output layer and whatever it does to its logits afterwards (Gemma's soft cap,
    Granite's scaling). Calling the output layer directly would miss the latter.
    """
    decoder = _decoder(model)
    replaced = type(output)(**{**output, "last_hidden_state": hidden})
    num_calls = 0

    def return_replaced(*_args: Any, **_kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return replaced

    decoder.forward = return_replaced
    try:
        yield
    finally:
        del decoder.forward
    assert num_calls, f"{type(model).__name__} does not call its decoder as a submodule"
