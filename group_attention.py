"""Attention over a packed row, in which the responses of a group share their prompt's keys and values.

A packed row holds every token of a forward pass once: each prompt, then its responses, group after group.
Nothing is padded and no prompt is repeated, so that all layers but attention see exactly the tokens that there
are. Attention is the one place where tokens meet, and there a response sees its prompt and itself:

    softmax([q k_prompt | q k_own] * scaling + mask) [v_prompt | v_own]

How it is fast: all responses of a group meet their prompt's keys in one matrix product, whose rows are the
tokens and the query heads that share a key head; scores are made anew in backward instead of kept, for a block
of token positions at a time, and own keys only up to the diagonal.

Shapes: N packed tokens; R groups, one prompt and at most G responses each; T positions of a row, b of a block;
P prompt positions; K key heads, each for J query heads; D head width.
"""

import inspect
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, DynamicCache

NAME = "gspo_groups"  # as transformers knows it
# Attention scores held at a time; with their copies in float32 and in the compute type about 200 MB.
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

    def padded(self, packed: torch.Tensor, num_keys: int) -> torch.Tensor:
        """(N, heads, D) to (R, K, G, T, J, D), 0 where there is no token."""
        rows = packed.new_zeros(math.prod(self.shape), *packed.shape[1:])
        rows.index_copy_(0, self.slots, packed.index_select(0, self.places))
        rows = rows.view(*self.shape, num_keys, packed.shape[1] // num_keys, packed.shape[2])
        return rows.permute(0, 3, 1, 2, 4, 5).contiguous()

    def write(self, padded: torch.Tensor, packed: torch.Tensor) -> None:
        """(R, K, G, T, J, D) into (N, heads, D)."""
        rows = padded.permute(0, 2, 3, 1, 4, 5).reshape(-1, *packed.shape[1:])
        packed.index_copy_(0, self.places, rows.index_select(0, self.slots))


class PackedGroups:
    """Groups of token ids, a prompt and its responses each, as one packed row.

    Attributes: input_ids, position_ids (1, N); predictors, for each group and each response the packed places
    whose hidden states predict the response's tokens and one more: the prompt's last, then the response's own.
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

    def mask(self, shared: int, block: slice, window: int | None) -> torch.Tensor:
        """What a block of a row's tokens sees of shared prompt keys and of own keys up to its end: 0, else -inf.

        (R, 1, 1, b, 1, shared + end) float32. Made once for all layers.
        """
        start, end = block.start, block.stop
        key = (shared, start, end, window)
        if key not in self._masks:
            lengths = self.prompt_lengths[:, None] * bool(shared)  # a prompt's own rows start at position 0
            device = lengths.device
            query = lengths + torch.arange(start, end, device=device)  # positions (R, b)
            in_prompt = torch.arange(shared, device=device).expand(len(lengths), -1)
            keys = torch.cat([in_prompt, lengths + torch.arange(end, device=device)], 1)  # (R, shared + end)
            seen = keys[:, None] <= query[:, :, None]
            seen[:, :, :shared] &= (in_prompt < lengths)[:, None]
            if window is not None:
                seen &= keys[:, None] > query[:, :, None] - window
            mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            self._masks[key] = mask[:, None, None, :, None]
        return self._masks[key]


@contextmanager
def attending_in(model, groups: PackedGroups):
    """Within it, the model's forward pass over groups.input_ids attends as packed groups."""
    global _groups
    config = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    config._attn_implementation, _groups = NAME, groups
    try:
        yield
    finally:
        config._attn_implementation, _groups = usual, None


_groups: PackedGroups | None = None


def _attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, position_bias=None, **kwargs,
):  # fmt: skip
    """transformers' attention interface: query (1, heads, N, D), key and value (1, K, N, D) to (1, N, heads, D)."""
    assert not dropout and s_aux is None and position_bias is None, "can_pack() should have refused the model"
    terms = _Terms(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    packed = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]  # (N, heads, D)
    return _PackedAttention.apply(*packed, _groups, terms)[None], None


AttentionInterface.register(NAME, _attention)


@dataclass(frozen=True)
class _Terms:
    """What the scores of a layer are made with."""

    scaling: float
    window: int | None
    softcap: float | None


class _PackedAttention(torch.autograd.Function):
    """Attention of packed queries (N, heads, D) to keys and values (N, K, D); output (N, heads, D)."""

    @staticmethod
    def forward(ctx, query, key, value, groups: PackedGroups, terms: _Terms):
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        sums = []
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(groups, query, key, value):
                padded = torch.empty_like(part.query[..., :1]).repeat_interleave(value.shape[-1], -1)
                log_sums = part.query[..., :1].float()
                for block in part.blocks():
                    scores, _ = part.scores(block, groups, terms)
                    log_sums[:, :, :, block] = scores.logsumexp(-1, keepdim=True)
                    weights = scores.sub_(log_sums[:, :, :, block]).exp_().to(query.dtype)
                    padded[:, :, :, block] = _weighted_sum(weights, part.value, part.prompt_value)
                part.rows.write(padded, output)
                sums.append(log_sums)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.groups, ctx.terms = groups, terms
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, *sums = ctx.saved_tensors
        grads = [torch.empty_like(states) for states in (query, key, value)]
        # what the softmax takes off the gradient of every weight: the sum of weight x gradient
        centre = (grad_output.float() * output.float()).sum(-1, keepdim=True)  # (N, heads, 1)
        grad_prompt = None
        for part, log_sums in zip(_parts(ctx.groups, query, key, value), sums, strict=True):
            grad_out = part.rows.padded(grad_output, key.shape[1])
            offset = part.rows.padded(centre, key.shape[1])
            grad_query = torch.empty_like(part.query)
            grad_key, grad_value, grad_prompt_key, grad_prompt_value = (
                torch.zeros_like(states, dtype=torch.float32) for states in part.keys_and_values()
            )
            for block in part.blocks():
                scores, slope = part.scores(block, ctx.groups, ctx.terms)
                weights = scores.sub_(log_sums[:, :, :, block]).exp_()
                block_grad = grad_out[:, :, :, block]
                grad_weights = _products(block_grad, part.value, part.prompt_value, block).float()
                grad_scores = grad_weights.sub_(offset[:, :, :, block]).mul_(weights).mul_(ctx.terms.scaling)
                grad_scores = (grad_scores if slope is None else grad_scores.mul_(slope)).to(query.dtype)
                grad_query[:, :, :, block] = _weighted_sum(grad_scores, part.key, part.prompt_key)
                _add_transposed(grad_scores, part.query[:, :, :, block], grad_key, grad_prompt_key)
                _add_transposed(weights.to(query.dtype), block_grad, grad_value, grad_prompt_value)
            if grad_prompt is None:  # of the responses, which come first: here they meet in their prompts
                grad_prompt = grad_prompt_key, grad_prompt_value
            else:
                grad_key[:, :, 0] += grad_prompt[0]
                grad_value[:, :, 0] += grad_prompt[1]
            part.rows.write(grad_query, grads[0])
            part.rows.write(grad_key[..., None, :].to(key.dtype), grads[1])
            part.rows.write(grad_value[..., None, :].to(value.dtype), grads[2])
        return *grads, None, None


@dataclass
class _Part:
    """The prompts, or the responses, as padded rows: each attends to its own keys, and to its prompt's."""

    rows: Rows
    query: torch.Tensor  # (R, K, G, T, J, D)
    key: torch.Tensor  # (R, K, G, T, D)
    value: torch.Tensor
    prompt_key: torch.Tensor  # (R, K, P, D); P = 0 for the prompts themselves
    prompt_value: torch.Tensor

    def keys_and_values(self):
        return self.key, self.value, self.prompt_key, self.prompt_value

    def blocks(self):
        """Slices of positions, such that a block's scores stay within MAX_SCORES."""
        num_groups, num_keys, size, length, heads, _ = self.query.shape
        scores = num_groups * num_keys * size * heads * (self.prompt_key.shape[2] + length)  # of a position
        step = max(1, MAX_SCORES // max(1, scores))
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def scores(self, block: slice, groups: PackedGroups, terms: _Terms):
        """(R, K, G, b, J, P + end of block) float32; and their slope under the soft cap, if there is one."""
        scores = _products(self.query[:, :, :, block], self.key, self.prompt_key, block).float()
        scores *= terms.scaling
        slope = None
        if terms.softcap is not None:
            capped = torch.tanh(scores / terms.softcap)
            scores, slope = capped * terms.softcap, 1 - capped.square()
        return scores.add_(groups.mask(self.prompt_key.shape[2], block, terms.window)), slope


def _parts(groups: PackedGroups, query, key, value):
    """The responses, then the prompts."""
    num_keys = key.shape[1]

    def padded(rows):
        return [rows.padded(query, num_keys), *(rows.padded(x, num_keys)[..., 0, :] for x in (key, value))]

    prompts, responses = padded(groups.prompts), padded(groups.responses)
    of_prompt = [states[:, :, 0] for states in prompts[1:]]  # (R, K, P, D)
    yield _Part(groups.responses, *responses, *of_prompt)
    yield _Part(groups.prompts, *prompts, *(states[:, :, :0] for states in of_prompt))


def _products(x, own, prompt, block: slice):
    """Of x (R, K, G, b, J, D) with its prompt's (R, K, P, D) and its own (R, K, G, T, D) up to the block's end.

    (R, K, G, b, J, P + end)
    """
    with_prompt = x.flatten(2, 4) @ prompt.transpose(-1, -2)
    with_own = x.flatten(3, 4) @ own[:, :, :, : block.stop].transpose(-1, -2)
    shape = x.shape[:-1]
    return torch.cat([with_prompt.view(*shape, -1), with_own.view(*shape, block.stop)], -1)


def _weighted_sum(weights, own, prompt):
    """Of prompt (R, K, P, D) and own (R, K, G, T, D) under weights (R, K, G, b, J, P + end): (R, K, G, b, J, D)."""
    shape, split = weights.shape[:-1], prompt.shape[2]
    of_prompt = weights[..., :split].flatten(2, 4) @ prompt
    of_own = weights[..., split:].flatten(3, 4) @ own[:, :, :, : weights.shape[-1] - split]
    return of_own.view(*shape, -1).add_(of_prompt.view(*shape, -1))


def _add_transposed(weights, x, own, prompt) -> None:
    """Add weights' (R, K, G, b, J, P + end) products with x (R, K, G, b, J, D), summed over its rows, to own and
    prompt."""
    split = prompt.shape[2]
    end = weights.shape[-1] - split
    prompt += weights[..., :split].flatten(2, 4).transpose(-1, -2) @ x.flatten(2, 4)
    own[:, :, :, :end] += weights[..., split:].flatten(3, 4).transpose(-1, -2) @ x.flatten(3, 4)
