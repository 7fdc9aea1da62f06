"""Packed attention on NVIDIA GPUs: torch's flash attention for rows of any length.

It is the kernel behind torch.nn.attention.varlen. Its operators are called directly because only they take
an output and log-sums that are not their own, and because they are the same in torch 2.11 and 2.13, where
the functions around them differ. They attend within segments of the packed states, so nothing is padded;
they skip what causality or a window hides, and several query heads can share one head of keys.

Shapes: N packed tokens; n query tokens of some segments, m key tokens; heads of queries; K heads of keys and
values; D head width, the same for keys and values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gspo.policy.packed_rows import PackedGroups, Segments


def fits_varlen(dtype: torch.dtype, softcap: float | None, key_width: int, value_width: int) -> bool:
    """Return whether the kernel can compute this attention: what it asks of types and head widths."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and key_width == value_width
        and key_width % 8 == 0
        and key_width <= 256
    )


@dataclass(frozen=True)
class VarlenKernel:
    """Flash attention of segments. `window` is how many tokens back a token sees, itself included."""

    scaling: float
    window: int | None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: PackedGroups
    ) -> torch.Tensor:
        """Return the output (N, heads, D) of packed queries (N, heads, D) and keys and values (N, K, D)."""
        function = _FullAttention if self.window is None else _WindowAttention
        return function.apply(query, key, value, groups, self)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from query (n, heads, D) to key and value (m, K, D), segment by segment.

        Args:
            causal: whether a query sees the keys up to its own position only. The last query of a segment has
                the position of the segment's last key.

        Returns:
            The output (n, heads, D), and the float32 log-sums (heads, n) of the scores.
        """
        output, log_sums, _, _, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *_bounds(segments), 0.0, causal and self.window is None, False,
            **self._options(causal),
        )  # fmt: skip
        return output, log_sums

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sums: torch.Tensor,
        segments: Segments,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of query, key and value.

        Args:
            output, log_sums: those of the whole softmax, of which the keys given may be a part.
        """
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # a random state, never read
        unused = torch.empty(0, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad_output, query, key, value, output, log_sums, *_bounds(segments), 0.0,
            causal and self.window is None, no_dropout, unused, **self._options(causal),
        )  # fmt: skip

    def _options(self, causal: bool) -> dict[str, Any]:
        # In torch's terms, a window of w is w - 1 keys to the left; -1 keys are all keys.
        left = -1 if self.window is None else self.window - 1
        right = 0 if causal else -1
        return {"scale": self.scaling, "window_size_left": left, "window_size_right": right}


def _bounds(segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    # The longest segment is an upper bound for the kernel. At 1, it would take its path for decoding.
    longest_query = max(2, segments.longest_query)
    return segments.query_bounds, segments.key_bounds, longest_query, segments.longest_key


class _FullAttention(torch.autograd.Function):
    """Attention to all earlier tokens, in two parts under one softmax, as padded_attention.py explains.

    In the first part, each prompt and each response attends to itself. In the second, the responses of a
    group attend to their prompt.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: PackedGroups,
        kernel: VarlenKernel,
    ) -> torch.Tensor:
        output, log_sums = kernel.forward(query, key, value, groups.own_segments, causal=True)
        shared = groups.shared_segments
        if shared is not None:
            states = _take(shared, query, key, value)
            shared_output, shared_log_sums = kernel.forward(*states, shared, causal=False)
            rows = shared.query_indices
            own_output, own_log_sums = output.index_select(0, rows), log_sums.index_select(1, rows)
            # exp(l_shared - l_both), (n, heads, 1)
            shared_share = torch.sigmoid(shared_log_sums - own_log_sums).T[..., None]
            joined = torch.lerp(own_output.float(), shared_output.float(), shared_share)
            output.index_copy_(0, rows, joined.to(output.dtype))
            log_sums.index_copy_(1, rows, torch.logaddexp(own_log_sums, shared_log_sums))
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.kernel = groups, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        groups, kernel = ctx.groups, ctx.kernel
        # `output` and `log_sums` are those of both parts
        grads = kernel.backward(
            grad_output, query, key, value, output, log_sums, groups.own_segments, causal=True
        )
        shared = groups.shared_segments
        if shared is not None:
            rows = shared.query_indices
            shared_grads = kernel.backward(
                grad_output.index_select(0, rows), *_take(shared, query, key, value),
                output.index_select(0, rows), log_sums.index_select(1, rows), shared, causal=False,
            )  # fmt: skip
            grads[0].index_add_(0, rows, shared_grads[0])
            grads[1].index_add_(0, shared.key_indices, shared_grads[1])
            grads[2].index_add_(0, shared.key_indices, shared_grads[2])
        return *grads, None, None


class _WindowAttention(torch.autograd.Function):
    """Attention within a sliding window.

    The kernel has one window for all segments and counts positions from their ends. Responses of different
    lengths can therefore not share their prompt's keys: each gets a copy of those that it can see, which are
    fewer than the window.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: PackedGroups,
        kernel: VarlenKernel,
    ) -> torch.Tensor:
        assert kernel.window is not None
        segments = groups.window_segments(kernel.window)
        output, log_sums = kernel.forward(*_take(segments, query, key, value), segments, causal=True)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.segments, ctx.kernel = segments, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        states = _take(ctx.segments, query, key, value)
        grad_query, *grad_copies = ctx.kernel.backward(
            grad_output, *states, output, log_sums, ctx.segments, causal=True
        )
        grads = [grad_query]
        for copies in grad_copies:
            # A key's gradient is a sum over many copies, which is why it is made in float32.
            total = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
            total.index_add_(0, ctx.segments.key_indices, copies.float())
            grads.append(total.to(key.dtype))
        return *grads, None, None


def _take(
    segments: Segments, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the segments' queries (n, heads, D), keys and values (m, K, D) of the packed ones."""
    if segments.query_indices is not None:
        query = query.index_select(0, segments.query_indices)
    if segments.key_indices is not None:
        key, value = key.index_select(0, segments.key_indices), value.index_select(0, segments.key_indices)
    return query, key, value
