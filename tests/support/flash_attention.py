"""A slow stand-in on CPUs for the operators of torch's flash attention, which exist on GPUs only.

It is registered under the operators' own names, so torch checks the arguments against their schema. It
refuses what the GPU's kernel refuses, and it takes float32 and float64 besides, for sharp comparisons.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flash_attention_on_cpu() -> Iterator[list[str]]:
    """Give the operators a kernel for CPUs; yields a list that gets a name for every call."""
    calls: list[str] = []

    def forward(
        query, key, value, query_bounds, key_bounds, longest_query, longest_key, dropout, causal, debug, *,
        scale, window_size_left, window_size_right,
    ):  # fmt: skip
        calls.append("forward")
        _check(query, key, value, query_bounds, key_bounds, longest_query, longest_key)
        assert dropout == 0 and not debug
        output = torch.empty_like(query)
        log_sums = torch.empty(query.shape[1], query.shape[0])  # (heads, n) float32
        for queries, keys in _segments(query_bounds, key_bounds):
            scores = _scores(query[queries], key[keys], scale, causal, window_size_left, window_size_right)
            log_sums[:, queries] = scores.logsumexp(-1).float()
            # a query that sees nothing has a log-sum of -inf and an output of 0
            weights = scores.softmax(-1).nan_to_num()
            output[queries] = (weights @ _heads(value[keys], query)).transpose(0, 1).to(query.dtype)
        empty = torch.empty(0)
        return output, log_sums, torch.zeros(2, dtype=torch.uint64), empty, empty

    def backward(
        grad_output, query, key, value, output, log_sums, query_bounds, key_bounds, longest_query,
        longest_key, dropout, causal, rng_state, unused, *, scale, window_size_left, window_size_right,
    ):  # fmt: skip
        calls.append("backward")
        _check(query, key, value, query_bounds, key_bounds, longest_query, longest_key)
        assert grad_output.shape == output.shape == query.shape and grad_output.dtype == query.dtype
        assert log_sums.shape == (query.shape[1], query.shape[0]) and log_sums.dtype == torch.float32
        assert log_sums.is_contiguous(), "the kernel reads its memory as it lies"
        assert dropout == 0 and rng_state.dtype == torch.uint64
        grads = [torch.zeros(states.shape, dtype=torch.float64) for states in (query, key, value)]
        for queries, keys in _segments(query_bounds, key_bounds):
            scores = _scores(query[queries], key[keys], scale, causal, window_size_left, window_size_right)
            weights = (scores - log_sums[:, queries, None].double()).exp()  # (heads, n, m)
            grad = grad_output[queries].double().transpose(0, 1)  # (heads, n, D)
            mean = (grad * output[queries].double().transpose(0, 1)).sum(-1, keepdim=True)
            grad_scores = weights * (grad @ _heads(value[keys], query).transpose(1, 2) - mean) * scale
            of_query = grad_scores @ _heads(key[keys], query)
            of_key = grad_scores.transpose(1, 2) @ query[queries].double().transpose(0, 1)
            of_value = weights.transpose(1, 2) @ grad
            grads[0][queries] += of_query.transpose(0, 1)
            grads[1][keys] += of_key.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
            grads[2][keys] += of_value.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
        return tuple(grad.to(query.dtype) for grad in grads)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _check(query, key, value, query_bounds, key_bounds, longest_query, longest_key) -> None:
    """Refuse what the kernel in torch's flash_api.cpp refuses, and segments that are empty."""
    assert query.dim() == 3 and query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape and key.shape[2] == query.shape[2]
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert all(states.stride(-1) == 1 for states in (query, key, value))
    for bounds, states, longest in ((query_bounds, query, longest_query), (key_bounds, key, longest_key)):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
        assert bounds[0] == 0 and bounds[-1] == len(states)
        assert bounds.diff().min() > 0 and bounds.diff().max() <= longest
    assert len(query_bounds) == len(key_bounds)


def _segments(query_bounds: torch.Tensor, key_bounds: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    queries, keys = query_bounds.tolist(), key_bounds.tolist()
    for i in range(len(queries) - 1):
        yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])


def _heads(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values (m, K, D) in float64, one for each query head: (heads, m, D)."""
    return states.double().repeat_interleave(query.shape[1] // states.shape[1], 1).transpose(0, 1)


def _scores(query, key, scale, causal, left, right) -> torch.Tensor:
    """Return float64 scores (heads, n, m). The last query has the position of the last key."""
    scores = query.double().transpose(0, 1) @ _heads(key, query).transpose(1, 2) * scale
    position = torch.arange(len(query))[:, None] + len(key) - len(query)
    distance = position - torch.arange(len(key))
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal or right >= 0:
        hidden |= distance < (0 if causal else -right)
    if left >= 0:
        hidden |= distance > left
    return scores.masked_fill(hidden, -torch.inf)
