"""Packed attention in padded rows: torch's fused kernel for CPUs, and plain tensor operations for the rest.

group_attention.py says what is computed, and _PaddedAttention how.

Shapes: N packed tokens; R groups of one prompt and at most G responses each; T positions of a padded response
(or of any padded row), P of a padded prompt; heads of queries; K heads of keys and values; D head width. The
kernels see B rows with L query positions, a block of b queries at a time, and S key positions.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gspo.policy.packed_rows import PackedGroups, additive_mask

# The most attention scores that PlainKernel holds at a time; with their copies they take about 200 MB.
MAX_SCORES = 1 << 24


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """Undo Rows.by_row or by_group: (rows, heads, positions, ...) to (R * G * T, heads, ...)."""
    return states.transpose(1, 2).flatten(0, 1)


class _PaddedAttention(torch.autograd.Function):
    """Attention of packed queries (N, heads, D) to keys and values (N, K, D); the output is (N, heads, D).

    It consists of three plain attentions: prompts to themselves, responses to themselves ("own"), and
    responses to their prompts ("shared"). The last two are parts of one softmax.

    Forward. A query's scores s_j give a part's output o = sum_j exp(s_j - l) v_j, where
    l = log(sum_j exp(s_j)) is the part's log-sum. Over both parts the log-sum is
    l_both = log(exp(l_own) + exp(l_shared)), and the output is

        o_both = exp(l_own - l_both) o_own + exp(l_shared - l_both) o_shared

    Backward. With the weights p_j = exp(s_j - l_both) and the output's gradient g, the gradients of one key's
    score and value are

        ds_j = p_j (g v_j - g o_both)          dv_j = p_j g

    A key's gradient thus needs its own part's keys and values, and of the other part only what is in l_both
    and o_both. So each part's backward is that of plain attention, given l_both and o_both in place of
    its own log-sum and output. A query's gradient is the sum over the two parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: PackedGroups,
        kernel: "FlashKernel | PlainKernel",
    ) -> torch.Tensor:
        prompts, responses = groups.prompts, groups.responses
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        log_sums = None
        with torch.autocast(query.device.type, enabled=False):
            prompt_query, prompt_key, prompt_value = (
                prompts.by_row(prompts.pad(states)) for states in (query, key, value)
            )
            prompt_output, prompt_log_sums = kernel.forward(prompt_query, prompt_key, prompt_value, None)
            prompts.unpad(_by_token(prompt_output), output)
            if len(responses.padded_indices):
                padded = [responses.pad(states) for states in (query, key, value)]
                own_query, own_key, own_value = map(responses.by_row, padded)
                own_output, own_log_sums = kernel.forward(own_query, own_key, own_value, None)
                # the queries of a whole group, so that the prompt's keys need no copy per response
                shared_output, shared_log_sums = kernel.forward(
                    responses.by_group(padded[0]), prompt_key, prompt_value, groups
                )
                # the two parts have different layouts, so join them token by token
                own_log_sums, shared_log_sums = _by_token(own_log_sums), _by_token(shared_log_sums)
                log_sums = torch.logaddexp(own_log_sums, shared_log_sums)  # (R * G * T, heads)
                own_share = (own_log_sums - log_sums).exp()[..., None].to(own_output.dtype)
                shared_share = (shared_log_sums - log_sums).exp()[..., None].to(own_output.dtype)
                joined = _by_token(own_output) * own_share
                joined += _by_token(shared_output) * shared_share
                responses.unpad(joined, output)
        ctx.save_for_backward(query, key, value, output, prompt_log_sums, log_sums)
        ctx.groups, ctx.kernel = groups, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, prompt_log_sums, log_sums = ctx.saved_tensors
        groups, kernel = ctx.groups, ctx.kernel
        prompts, responses = groups.prompts, groups.responses
        grad_packed = [torch.empty_like(states) for states in (query, key, value)]
        states_of_forward = (grad_output, query, key, value, output)

        prompt_states = [prompts.by_row(prompts.pad(states)) for states in states_of_forward]
        grads = kernel.backward(*prompt_states, prompt_log_sums, None)
        grad_prompts = [_by_token(grad) for grad in grads]
        if len(responses.padded_indices):
            padded = [responses.pad(states) for states in states_of_forward]
            log_sums = log_sums[..., None]  # (R * G * T, heads, 1), a state like the others
            # own part: `output` and `log_sums` are those of both parts
            own_states = [responses.by_row(states) for states in padded]
            grads = kernel.backward(*own_states, responses.by_row(log_sums)[..., 0], None)
            grad_responses = [_by_token(grad) for grad in grads]
            # shared part: the prompt's keys and values, with the same output and log-sums
            group_grad, group_query, group_output = (responses.by_group(padded[i]) for i in (0, 1, 4))
            _, _, prompt_key, prompt_value, _ = prompt_states
            grad_query, *grad_shared = kernel.backward(
                group_grad, group_query, prompt_key, prompt_value, group_output,
                responses.by_group(log_sums)[..., 0], groups,
            )  # fmt: skip
            grad_responses[0] += _by_token(grad_query)
            # a prompt's keys and values also get gradients from the responses that attended to them
            for grad, shared in zip(grad_prompts[1:], grad_shared, strict=True):
                grad += _by_token(shared)
            for grad, packed in zip(grad_responses, grad_packed, strict=True):
                responses.unpad(grad, packed)
        for grad, packed in zip(grad_prompts, grad_packed, strict=True):
            prompts.unpad(grad, packed)
        return *grad_packed, None, None


@dataclass(frozen=True)
class FlashKernel:
    """torch's fused attention for CPUs, which returns its log-sums.

    It computes in float32. For rows of tens of tokens, backward is four times faster so than in bfloat16, and
    never much slower.
    """

    scaling: float

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: PackedGroups
    ) -> torch.Tensor:
        """Return the output (N, heads, D) of packed queries (N, heads, D) and keys and values (N, K, D)."""
        return _PaddedAttention.apply(query, key, value, groups, self)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: PackedGroups | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend causally or, with groups, from responses to their prompts.

        Args:
            query: (B, heads, L, D).
            key, value: (B, K, S, D).

        Returns:
            The output (B, heads, L, D), and the log-sums (B, heads, L) of the scores.
        """
        mask = None if groups is None else groups.prompt_mask(None)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, groups is None, attn_mask=mask, scale=self.scaling
        )

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sums: torch.Tensor,
        groups: PackedGroups | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of query, key and value.

        Args:
            output, log_sums: those of the whole softmax, of which the keys given may be a part.
        """
        mask = None if groups is None else groups.prompt_mask(None)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, log_sums, 0.0, groups is None,
            attn_mask=mask, scale=self.scaling,
        )  # fmt: skip


@dataclass(frozen=True)
class PlainKernel:
    """The same attention in plain tensor operations: for any device, sliding windows and soft caps.

    It takes a block of queries at a time, so that it never holds more than MAX_SCORES scores.
    """

    scaling: float
    window: int | None
    softcap: float | None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: PackedGroups
    ) -> torch.Tensor:
        """Do what FlashKernel.attend does."""
        return _PaddedAttention.apply(query, key, value, groups, self)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: PackedGroups | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what FlashKernel.forward does."""
        mask = self._mask(groups, key)
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for block in _blocks(query, key):
            scores, _ = self._scores(query[:, :, block], key, _block_of(mask, block))
            block_log_sums = scores.logsumexp(-1)
            log_sums[:, :, block] = block_log_sums
            # A window may hide the whole prompt. The log-sum is then -inf, and scores - log_sum would be NaN:
            # clamped, the difference is -inf and the weights are 0.
            block_log_sums = block_log_sums[..., None].clamp(min=torch.finfo(torch.float32).min)
            weights = (scores - block_log_sums).exp()
            output[:, :, block] = weights.to(query.dtype) @ value
        return output, log_sums

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sums: torch.Tensor,
        groups: PackedGroups | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do what FlashKernel.backward does."""
        mask = self._mask(groups, key)
        num_kv_heads = key.shape[1]
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        # g o in the formula of _PaddedAttention: the mean of g v_j under the weights, (B, heads, L, 1)
        mean_grad = (grad_output.float() * output.float()).sum(-1, keepdim=True)
        for block in _blocks(query, key):
            block_grad = grad_output[:, :, block]
            scores, slope = self._scores(query[:, :, block], key, _block_of(mask, block))
            weights = (scores - log_sums[:, :, block, None]).exp()  # p_j, (B, heads, b, S)
            grad_weights = (block_grad @ value.transpose(-1, -2)).float()  # g v_j
            grad_products = (grad_weights - mean_grad[:, :, block]) * weights * slope  # of q k
            grad_products = grad_products.to(query.dtype)
            grad_query[:, :, block] = grad_products @ key
            grad_key += grad_products.transpose(-1, -2) @ query[:, :, block]
            grad_value += weights.to(query.dtype).transpose(-1, -2) @ block_grad
        return grad_query, _sum_heads(grad_key, num_kv_heads), _sum_heads(grad_value, num_kv_heads)

    def _mask(self, groups: PackedGroups | None, key: torch.Tensor) -> torch.Tensor | None:
        if groups is not None:
            return groups.prompt_mask(self.window)
        position = torch.arange(key.shape[2], device=key.device)
        distance = position[:, None] - position  # (L, L), query - key
        window = self.window or len(position)
        return additive_mask((distance < 0) | (distance >= window))[None, None]

    def _scores(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return float32 scores (B, heads, b, S), and their derivative by the products of query and key."""
        scores = (query @ key.transpose(-1, -2)).float() * self.scaling
        slope: torch.Tensor | float = self.scaling
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores = capped * self.softcap
            slope = (1 - capped.square()) * self.scaling
        if mask is not None:
            scores = scores + mask
        return scores, slope


def _repeat_heads(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values (B, K, S, D) to one for each query head, (B, heads, S, D)."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], 1)


def _sum_heads(grad: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Undo _repeat_heads for gradients: (B, heads, S, D) to (B, K, S, D)."""
    return grad.unflatten(1, (num_kv_heads, -1)).sum(2)


def _blocks(query: torch.Tensor, key: torch.Tensor) -> list[slice]:
    """Return slices of query positions, such that the scores of a slice are at most MAX_SCORES."""
    scores_per_query = query.shape[0] * query.shape[1] * key.shape[2]
    step = max(1, MAX_SCORES // max(1, scores_per_query))
    return [slice(start, start + step) for start in range(0, query.shape[2], step)]


def _block_of(mask: torch.Tensor | None, block: slice) -> torch.Tensor | None:
    """Return the rows of the mask for a block of queries; a mask with one row serves all queries."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask[:, :, block]
