"""Attention over a packed row, in which the responses of a group share their prompt's keys and values.

A packed row holds every token of a forward pass once: each prompt, then its responses, group after group.
Nothing is padded and no prompt is repeated. All layers but attention treat each token by itself, so they work
on the packed row as it is. Attention is where tokens interact. There, a prompt attends causally to itself,
and a response attends to its prompt and causally to itself:

    softmax([q k_prompt | q k_own] * scaling) [v_prompt | v_own]

This is fast because the group's response tokens all meet the prompt's one copy of keys in one attention call.
A second call has each response attend to itself, and the two results are joined under a common softmax. The
scores are recomputed in backward and never kept.

Shapes: N packed tokens; R groups of one prompt and at most G responses each; T positions of a padded response
(or of any padded row), P of a padded prompt; heads of queries; K heads of keys and values; D head width. The
kernels see B rows with L query positions, a block of b queries at a time, and S key positions.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from gspo.policy.prompt_cache import can_share_prompts

# The name under which transformers knows this attention.
ATTENTION_NAME = "gspo_groups"
# The most attention scores that PlainKernel holds at a time; with their copies they take about 200 MB.
MAX_SCORES = 1 << 24


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether the model's forward pass can take a packed row.

    The tokens of such a model interact only in plain attention, called through transformers' interface. This
    excludes models with recurrent or convolutional layers, attention in chunks or attention sinks. It also
    excludes models of which any layer is in training mode. Such a layer may apply dropout, or be recomputed
    in backward (gradient checkpointing), where the packed row is no longer known.
    """
    if not model._supports_attention_backend:
        return False
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return (
        set(layer_types or ()) <= {"full_attention", "sliding_attention"}
        and can_share_prompts(model)
        and "position_ids" in inspect.signature(model.forward).parameters
        and not any(module.training or hasattr(module, "sinks") for module in model.modules())
    )


class Rows:
    """Rows of a packed row's tokens, R groups of G rows, and how to pad them to T positions and back.

    Attributes:
        shape: (R, G, T).
        padded_indices: (n,), where the n tokens stand among the R * G * T padded positions.
        packed_indices: (n,), where the same tokens stand in the packed row.
        padding_indices: the padded positions that hold no token.
    """

    def __init__(self, groups: Sequence[Sequence[Sequence[int]]], device: torch.device) -> None:
        """Args: groups: for each group and each of its rows, the packed index of every token."""
        lengths = [len(row) for group in groups for row in group]
        self.shape = (len(groups), max(map(len, groups)), max(lengths, default=0))
        indices = torch.full(self.shape, -1)  # (R, G, T), -1 for padding
        for i, group in enumerate(groups):
            for j, row in enumerate(group):
                indices[i, j, : len(row)] = torch.tensor(row, dtype=torch.long)
        indices = indices.flatten()
        self.padded_indices = (indices >= 0).nonzero()[:, 0].to(device)
        self.packed_indices = indices[indices >= 0].to(device)
        self.padding_indices = (indices < 0).nonzero()[:, 0].to(device)
        # (R * G * T,): which packed token to copy to each padded position; for padding any will do
        self._source_indices = indices.clamp(min=0).to(device)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Copy packed states (N, heads, D) to padded ones (R * G * T, heads, D), with 0 for padding."""
        padded = packed.index_select(0, self._source_indices)
        if len(self.padding_indices):
            padded.index_fill_(0, self.padding_indices, 0.0)
        return padded

    def unpad(self, padded: torch.Tensor, packed: torch.Tensor) -> None:
        """Copy padded states (R * G * T, heads, D) into packed ones (N, heads, D), in place."""
        if len(self.padding_indices):
            padded = padded.index_select(0, self.padded_indices)
        packed.index_copy_(0, self.packed_indices, padded.to(packed.dtype))

    def by_row(self, padded: torch.Tensor) -> torch.Tensor:
        """View (R * G * T, heads, D) as (R * G, heads, T, D): a row attends by itself."""
        num_groups, size, length = self.shape
        return padded.view(num_groups * size, length, *padded.shape[1:]).transpose(1, 2)

    def by_group(self, padded: torch.Tensor) -> torch.Tensor:
        """View (R * G * T, heads, D) as (R, heads, G * T, D): the rows of a group attend together."""
        num_groups, size, length = self.shape
        return padded.view(num_groups, size * length, *padded.shape[1:]).transpose(1, 2)


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """Undo by_row or by_group: (rows, heads, positions, ...) to (R * G * T, heads, ...)."""
    return states.transpose(1, 2).flatten(0, 1)


class PackedGroups:
    """Groups of one prompt and its responses, as one packed row of token ids.

    Attributes:
        input_ids, position_ids: (1, N).
        predictors: for each group and each of its responses, the packed indices of the tokens whose hidden
            states predict the response's tokens and the one after them: the prompt's last token, then the
            response's own.
        prompts, responses: the Rows of each, with one prompt per group.
        prompt_lengths: (R,).
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device
    ) -> None:
        ids: list[int] = []
        positions: list[int] = []
        prompt_indices: list[list[range]] = []
        response_indices: list[list[range]] = []
        self.predictors: list[list[list[int]]] = []
        for prompt, group_responses in groups:
            prompt_indices.append([range(len(ids), len(ids) + len(prompt))])
            ids += prompt
            positions += range(len(prompt))
            last_of_prompt = len(ids) - 1
            response_indices.append([])
            self.predictors.append([])
            for response in group_responses:
                own = range(len(ids), len(ids) + len(response))
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
                response_indices[-1].append(own)
                self.predictors[-1].append([last_of_prompt, *own])
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.prompts = Rows(prompt_indices, device)
        self.responses = Rows(response_indices, device)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)
        self._masks: dict[int | None, torch.Tensor] = {}  # by window

    def prompt_mask(self, window: int | None) -> torch.Tensor | None:
        """Return what to add to the scores of response tokens over their prompts: 0 if visible, else -inf.

        The mask is made once and serves all layers that have the same window.

        Args:
            window: how many tokens back a token sees, itself included; None: all of them.

        Returns:
            (R, 1, 1, P), or (R, 1, G * T, P) with a window; None where every token sees everything.
        """
        if window is None and len(self.prompt_lengths.unique()) == 1:
            return None
        if window not in self._masks:
            _, size, length = self.responses.shape
            device = self.input_ids.device
            key_position = torch.arange(self.prompts.shape[2], device=device)  # (P,)
            lengths = self.prompt_lengths[:, None, None]  # (R, 1, 1)
            hidden = key_position >= lengths  # (R, 1, P): padding
            if window is not None:
                query_position = lengths + torch.arange(length, device=device)[:, None]  # (R, T, 1)
                hidden = hidden | (query_position - key_position >= window)  # (R, T, P)
                hidden = hidden.repeat(1, size, 1)  # (R, G * T, P), the same for each response of a group
            self._masks[window] = _additive(hidden)[:, None]
        return self._masks[window]


def _additive(hidden: torch.Tensor) -> torch.Tensor:
    """Return 0 where `hidden` is False and -inf where it is True."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


@contextmanager
def packed_attention(model: PreTrainedModel, groups: PackedGroups) -> Iterator[None]:
    """Make the model's attention treat its input as groups.input_ids, for the forward passes inside."""
    config = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    AttentionInterface.register(ATTENTION_NAME, partial(_attention, groups))
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def _attention(
    groups: PackedGroups,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: query (1, heads, N, D), key and value (1, K, N, D).

    Returns:
        The output (1, N, heads, D), and None for the attention weights, which are not kept.
    """
    assert not dropout and s_aux is None and position_bias is None, "can_pack() should have refused the model"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    packed = [states[0].transpose(0, 1) for states in (query, key, value)]  # (N, heads or K, D)
    device = query.device.type
    plain_softmax = sliding_window is None and softcap is None
    kernel: FlashKernel | PlainKernel
    if device == "cpu" and plain_softmax and key.shape[-1] == value.shape[-1]:
        kernel = FlashKernel(scaling)
        dtype = torch.float32
    else:
        kernel = PlainKernel(scaling, sliding_window, softcap)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    packed = [states.to(dtype) for states in packed]
    output = _PackedAttention.apply(*packed, groups, kernel)
    return output[None].to(query.dtype), None


class _PackedAttention(torch.autograd.Function):
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
        # g o in the formula of _PackedAttention: the mean of g v_j under the weights, (B, heads, L, 1)
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
        return _additive((distance < 0) | (distance >= window))[None, None]

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
