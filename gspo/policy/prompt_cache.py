"""Send each prompt through the model once when sampling, and let all its responses use its keys and values.

Prompts are left-padded, so that every response starts at the same index of the cache. The cache is allocated
once, for the longest response that there may be.

Shapes: Q prompts, G responses to each, B = Q * G responses or those of them still being sampled, P padded
prompt length, T the most response tokens, S tokens in the cache, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Return whether the model's cache holds keys and values only, which can be repeated for each response.

    This excludes models with recurrent or convolutional layers, which have other states.
    """
    layers = DynamicCache(config=model.config).layers
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Send the prompts (token ids) through the model as one batch, and make room for their responses.

    It runs on fake tensors too, and so does `decode`.

    Args:
        group_size: G, responses to each prompt.
        max_new_tokens: T, tokens of the longest response.

    Returns:
        The logits (B, V) after each response's prompt; the cache, with the prompts' keys and values for all B
        responses; and the mask (B, P + T), which is 0 for padding and 1 for the tokens of prompts and
        responses.
    """
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (Q, P)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)  # (Q, P)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    mask = mask.to(device)
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # layers with a sliding window keep transformers' own
            cache.layers[i] = PreallocatedLayer(group_size, width + max_new_tokens)
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # the first token of a prompt has position 0
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    mask = F.pad(mask, (0, max_new_tokens), value=1)
    return logits.repeat_interleave(group_size, 0), cache, mask.repeat_interleave(group_size, 0)


def decode(
    model: PreTrainedModel,
    cache: DynamicCache,
    mask: torch.Tensor,
    token: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Append a token to each response.

    Args:
        cache, mask: as `prefill` returns them, or some of their rows.
        token: (B,) ids.
        position: (B,) the token's position in its prompt and response, from 0.

    Returns:
        The logits (B, V) of the tokens that follow.
    """
    length = cache.get_seq_length() + 1
    return model(
        input_ids=token[:, None],
        attention_mask=decoding_mask(model, cache, mask[:, :length]),
        position_ids=position[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]


def decoding_mask(model: PreTrainedModel, cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Return the mask (B, S) of the tokens that the next one attends to, in the form that is fastest.

    Where every layer attends to all tokens, this is a mask (B, 1, 1, S) to add to the attention scores, in
    the type of the keys. Every layer would convert a mask of zeros and ones to it, for every token.
    """
    attends_to_all = all(type(layer) is PreallocatedLayer for layer in cache.layers)
    if not (model._supports_attention_backend and attends_to_all):
        return mask
    added = torch.zeros(mask.shape, dtype=cache.layers[0].keys.dtype, device=mask.device)
    return added.masked_fill_(mask == 0, -torch.inf)[:, None, None]


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in two buffers, allocated once. It serves sampling, without gradients.

    transformers' own layer copies all keys and values to append a token. Under autocast it also keeps them in
    float32, which attention then converts for every token; this one keeps them in the autocast type.

    The buffers have a row for each response and space for all its tokens. The prompts are written to the
    first row of each group and repeated from there. When rows leave, those that stay move to the front.

    Args:
        group_size: rows of the buffers for each row of the first update.
        capacity: tokens that a row has space for.
    """

    keys: torch.Tensor  # a view (rows in use, heads, S, head width) of the first buffer
    values: torch.Tensor  # the same of the second

    def __init__(self, group_size: int, capacity: int) -> None:
        super().__init__()
        self._group_size, self._capacity = group_size, capacity
        self._buffers: list[torch.Tensor] = []  # of keys and of values (Q * G, heads, capacity, head width)
        self._rows = slice(0, None, group_size)  # the rows in use

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (rows in use, heads, new tokens, width), and return all of them."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [self._new_buffer(states) for states in new]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[self._rows, :, start:end] = states
        self._use(self._rows, end)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy the first row of each group to the others, and use them all."""
        assert repeats == self._group_size
        length = self.get_seq_length()
        for buffer in self._buffers:
            groups = buffer[:, :, :length].unflatten(0, (-1, repeats))
            groups[:, 1:] = groups[:, :1]
        self._use(slice(None), length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these of the rows in use. They move to the front by way of a copy of one buffer's rows."""
        rows, length = slice(len(indices)), self.get_seq_length()
        for buffer in self._buffers:
            buffer[rows, :, :length] = buffer[indices, :, :length]
        self._use(rows, length)

    def _use(self, rows: slice, length: int) -> None:
        """Make self.keys and self.values views of these rows and so many tokens."""
        self._rows = rows
        if self._buffers:  # a layer that uses the keys and values of another has none
            self.keys, self.values = (buffer[rows, :, :length] for buffer in self._buffers)

    def _new_buffer(self, states: torch.Tensor) -> torch.Tensor:
        """Return an empty buffer for states (Q, heads, tokens, width), in the type that attention uses."""
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        rows, heads, _, width = states.shape
        return states.new_empty(rows * self._group_size, heads, self._capacity, width, dtype=dtype)
