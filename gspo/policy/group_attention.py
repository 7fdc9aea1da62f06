"""Attention over a packed row, in which the responses of a group share their prompt's keys and values.

A packed row holds every token of a forward pass once: each prompt, then its responses, group after group.
Nothing is padded and no prompt is repeated, so that all layers but attention see exactly the tokens that
there are. Attention is the one place where tokens meet, and there a response sees its prompt and itself:

    softmax([q k_prompt | q k_own] * scaling) [v_prompt | v_own],   causal among its own

How it is fast: every response token of a group meets the prompt's one copy of keys in one attention call, and
its own row's in another; a common softmax joins the two. Scores are made anew in backward, never kept.

Shapes: N packed tokens; R groups, one prompt and at most G responses each; T positions of a row, P of a
prompt; heads of queries, K of keys; D head width. In a kernel: B rows, L query positions, b of a block.
"""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AttentionInterface, DynamicCache

NAME = "gspo_groups"  # as transformers knows it
# Attention scores that PlainKernel holds at a time; with their copies about 200 MB.
MAX_SCORES = 1 << 24


def can_pack(model) -> bool:
    """Whether tokens of this model meet in plain attention alone, through transformers' interface.

    Not so: recurrent and convolutional layers, attention in chunks, attention sinks; and layers in training
    mode, which may drop out, or run again in backward, where the packed row is not known any more.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    return (
        model._supports_attention_backend
        and set(kinds) <= {"full_attention", "sliding_attention"}
        and all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=model.config).layers)
        and "position_ids" in inspect.signature(model.forward).parameters
        and not any(module.training or hasattr(module, "sinks") for module in model.modules())
    )


class Rows:
    """One row of each group's (R, G) rows, padded to T positions, and the way to and from the packed row."""

    def __init__(self, places: Sequence[Sequence[Sequence[int]]], device):
        """places: by group, by row, the packed place of each token."""
        self.shape = (len(places), max(map(len, places)), max((len(r) for g in places for r in g), default=0))
        packed = torch.full(self.shape, -1)
        for group, rows in zip(packed, places, strict=True):
            for padded, row in zip(group, rows, strict=False):
                padded[: len(row)] = torch.tensor(row, dtype=torch.long)
        packed = packed.flatten()
        self.slots = (packed >= 0).nonzero()[:, 0].to(device)  # padded places (n,) of the real tokens
        self.places = packed[packed >= 0].to(device)  # their packed places (n,)
        self.padding = (packed < 0).nonzero()[:, 0].to(device)  # padded places without a token
        self.read = packed.clamp(min=0).to(device)  # (R * G * T,) packed places, any for padding

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """(N, heads, D) to (R * G * T, heads, D), 0 where there is no token."""
        rows = packed.index_select(0, self.read)
        return rows.index_fill_(0, self.padding, 0.0) if len(self.padding) else rows

    def write(self, padded: torch.Tensor, packed: torch.Tensor) -> None:
        """(R * G * T, heads, D) into (N, heads, D)."""
        rows = padded.index_select(0, self.slots) if len(self.padding) else padded
        packed.index_copy_(0, self.places, rows.to(packed.dtype))

    def by_row(self, padded: torch.Tensor) -> torch.Tensor:
        """(R * G * T, heads, D) as (R * G, heads, T, D)."""
        groups, size, length = self.shape
        return padded.view(groups * size, length, *padded.shape[1:]).transpose(1, 2)

    def by_group(self, padded: torch.Tensor) -> torch.Tensor:
        """(R * G * T, heads, D) as (R, heads, G * T, D)."""
        groups, size, length = self.shape
        return padded.view(groups, size * length, *padded.shape[1:]).transpose(1, 2)


class PackedGroups:
    """Groups of token ids, a prompt and its responses each, as one packed row.

    Attributes: input_ids, position_ids (1, N); predictors, for each group and each response the packed
    places whose hidden states predict the response's tokens and one more: the prompt's last, then its own.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device):
        ids, positions, prompts, responses, self.predictors = [], [], [], [], []
        for prompt, rows in groups:
            prompts.append([range(len(ids), len(ids) + len(prompt))])
            responses.append([])
            self.predictors.append([])
            ids += prompt
            positions += range(len(prompt))
            last = len(ids) - 1
            for row in rows:
                own = range(len(ids), len(ids) + len(row))
                responses[-1].append(own)
                self.predictors[-1].append([last, *own])
                ids += row
                positions += range(len(prompt), len(prompt) + len(row))
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.prompts, self.responses = Rows(prompts, device), Rows(responses, device)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)  # (R,)
        self._masks = {}

    def prompt_mask(self, window: int | None) -> torch.Tensor | None:
        """What response tokens see of their prompts: 0, else -inf. (R, 1, 1 or G * T, P); None: everything.

        Made once for all layers.
        """
        if window is None and len(self.prompt_lengths.unique()) == 1:
            return None
        key = window
        if key not in self._masks:
            _, size, length = self.responses.shape
            place = torch.arange(self.prompts.shape[2], device=self.input_ids.device)
            lengths = self.prompt_lengths[:, None, None]  # (R, 1, 1)
            hidden = place >= lengths  # (R, 1, P)
            if window is not None:
                position = lengths + torch.arange(length, device=place.device)[:, None]  # (R, T, 1)
                hidden = (hidden | (position - place >= window)).repeat(1, size, 1)  # (R, G * T, P)
            self._masks[key] = _additive(hidden)[:, None]
        return self._masks[key]


def _additive(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


@contextmanager
def attending_in(model, groups: PackedGroups):
    """Within it, the model's forward pass over groups.input_ids attends as packed groups."""
    config = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    AttentionInterface.register(NAME, partial(_attention, groups))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def _attention(
    groups, module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
    softcap=None, s_aux=None, position_bias=None, **kwargs,
):  # fmt: skip
    """transformers' interface: query (1, heads, N, D), keys, values (1, K, N, D) to (1, N, heads, D)."""
    assert not dropout and s_aux is None and position_bias is None, "can_pack() should have refused the model"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    packed = [states[0].transpose(0, 1) for states in (query, key, value)]  # (N, heads, D)
    device = query.device.type
    flash = (
        device == "cpu" and sliding_window is None and softcap is None and key.shape[-1] == value.shape[-1]
    )
    if flash:
        kernel = FlashKernel(scaling)
        packed = [states.float() for states in packed]
    else:
        kernel = PlainKernel(scaling, sliding_window, softcap)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        packed = [states.to(dtype) for states in packed]
    return _PackedAttention.apply(*packed, groups, kernel)[None].to(query.dtype), None


class _PackedAttention(torch.autograd.Function):
    """Attention of packed queries (N, heads, D) to keys and values (N, K, D); output (N, heads, D).

    Three plain attentions: of prompts to themselves, of responses to themselves, of responses to their
    prompts. The last two share a softmax: with l the log-sum of a part (the logarithm of its softmax's
    denominator), the part's output counts exp(l - log(exp(l_1) + exp(l_2))). A part's gradient is that of the
    part alone, given the common output and the common log-sum.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups: PackedGroups, kernel):
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            prompts, responses = groups.prompts, groups.responses
            of_prompts = [prompts.padded(states) for states in (query, key, value)]
            out, prompt_sums = kernel.forward(*map(prompts.by_row, of_prompts), None)
            prompts.write(out.transpose(1, 2).flatten(0, 1), output)
            log_sums = None
            if len(responses.slots):
                of_responses = [responses.padded(states) for states in (query, key, value)]
                own, own_sums = kernel.forward(*map(responses.by_row, of_responses), None)
                shared, shared_sums = kernel.forward(
                    responses.by_group(of_responses[0]), *map(prompts.by_row, of_prompts[1:]), groups
                )
                own_sums, shared_sums = (
                    x.transpose(1, 2).reshape(-1, query.shape[1]) for x in (own_sums, shared_sums)
                )
                log_sums = torch.logaddexp(own_sums, shared_sums)  # (R * G * T, heads)
                out = own.transpose(1, 2).flatten(0, 1) * (own_sums - log_sums).exp()[..., None].to(own.dtype)
                share = (shared_sums - log_sums).exp()[..., None].to(own.dtype)
                out += shared.transpose(1, 2).flatten(0, 1) * share
                responses.write(out, output)
        ctx.save_for_backward(query, key, value, output, prompt_sums, log_sums)
        ctx.groups, ctx.kernel = groups, kernel
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, prompt_sums, log_sums = ctx.saved_tensors
        groups, kernel = ctx.groups, ctx.kernel
        prompts, responses = groups.prompts, groups.responses
        of_prompts = [prompts.padded(states) for states in (grad_output, query, key, value, output)]
        grads = kernel.backward(*map(prompts.by_row, of_prompts), prompt_sums, None)
        grad_prompts = [grad.transpose(1, 2).flatten(0, 1) for grad in grads]
        packed = [torch.empty_like(states) for states in (query, key, value)]
        if len(responses.slots):
            of_responses = [responses.padded(states) for states in (grad_output, query, key, value, output)]
            by_row, by_group = responses.by_row, responses.by_group
            grads = kernel.backward(*map(by_row, of_responses), by_row(log_sums[..., None])[..., 0], None)
            grad_own = [grad.transpose(1, 2).flatten(0, 1) for grad in grads]
            grad_query, *grad_shared = kernel.backward(
                *map(by_group, of_responses[:2]),
                *map(prompts.by_row, of_prompts[2:4]),
                by_group(of_responses[4]),
                by_group(log_sums[..., None])[..., 0],
                groups,
            )
            grad_own[0] += grad_query.transpose(1, 2).flatten(0, 1)
            for grad, shared in zip(grad_prompts[1:], grad_shared, strict=True):
                grad += shared.transpose(1, 2).flatten(0, 1)
            for grad, to in zip(grad_own, packed, strict=True):
                responses.write(grad, to)
        for grad, to in zip(grad_prompts, packed, strict=True):
            prompts.write(grad, to)
        return *packed, None, None


@dataclass(frozen=True)
class FlashKernel:
    """torch's fused attention on a CPU, which tells its log-sums.

    In float32: for rows of tens of tokens four times faster backward than in bfloat16, and never much slower.
    """

    scaling: float

    def forward(self, query, key, value, groups: PackedGroups | None):
        """Causal, or (with groups) of responses to their prompts.

        Returns: output (B, heads, L, D), and log-sums (B, heads, L).
        """
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            0.0,
            groups is None,
            attn_mask=groups and groups.prompt_mask(None),
            scale=self.scaling,
        )

    def backward(self, grad_output, query, key, value, output, log_sums, groups: PackedGroups | None):
        """Gradients of query, key and value, given the output and the log-sums of the whole softmax."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, log_sums, 0.0, groups is None,
            attn_mask=groups and groups.prompt_mask(None), scale=self.scaling,
        )  # fmt: skip


@dataclass(frozen=True)
class PlainKernel:
    """The same in plain tensor operations, for any device, with sliding windows and soft caps.

    A block of queries at a time: never more than MAX_SCORES scores.
    """

    scaling: float
    window: int | None
    softcap: float | None

    def forward(self, query, key, value, groups):
        mask = self._mask(groups, query, key)
        key, value = (self._for_each_head(states, query) for states in (key, value))
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for block in _blocks(query, key):
            scores, _ = self._scores(query[:, :, block], key, _rows_of(mask, block))
            log_sums[:, :, block] = scores.logsumexp(-1)
            # a window may hide the whole prompt
            weights = (scores - log_sums[:, :, block, None].clamp(min=torch.finfo(torch.float32).min)).exp()
            output[:, :, block] = weights.to(query.dtype) @ value
        return output, log_sums

    def backward(self, grad_output, query, key, value, output, log_sums, groups):
        mask, num_keys = self._mask(groups, query, key), key.shape[1]
        key, value = (self._for_each_head(states, query) for states in (key, value))
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        # what the softmax takes off the gradient of every weight: the sum of weight x gradient
        centre = (grad_output.float() * output.float()).sum(-1, keepdim=True)
        for block in _blocks(query, key):
            scores, slope = self._scores(query[:, :, block], key, _rows_of(mask, block))
            weights = (scores - log_sums[:, :, block, None]).exp()
            out = grad_output[:, :, block]
            grad_scores = ((out @ value.transpose(-1, -2)).float() - centre[:, :, block]) * weights * slope
            grad_scores = grad_scores.to(query.dtype)
            grad_query[:, :, block] = grad_scores @ key
            grad_key += grad_scores.transpose(-1, -2) @ query[:, :, block]
            grad_value += weights.to(query.dtype).transpose(-1, -2) @ out
        return grad_query, *(grad.unflatten(1, (num_keys, -1)).sum(2) for grad in (grad_key, grad_value))

    def _mask(self, groups, query, key):
        if groups is not None:
            return groups.prompt_mask(self.window)
        place = torch.arange(key.shape[2], device=key.device)
        distance = place[:, None] - place
        return _additive((distance < 0) | (distance >= (self.window or len(place))))[None, None]

    def _scores(self, query, key, mask):
        """(B, heads, b, L) float32, and their slope over the products of query and key."""
        scores, slope = (query @ key.transpose(-1, -2)).float() * self.scaling, self.scaling
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = capped * self.softcap, (1 - capped.square()) * self.scaling
        return scores if mask is None else scores + mask, slope

    @staticmethod
    def _for_each_head(states, query):
        return states.repeat_interleave(query.shape[1] // states.shape[1], 1)


def _rows_of(mask, block):
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, block]


def _blocks(query, key) -> list[slice]:
    """Slices of query positions, such that a block's scores stay within MAX_SCORES."""
    step = max(1, MAX_SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    return [slice(start, start + step) for start in range(0, query.shape[2], step)]
