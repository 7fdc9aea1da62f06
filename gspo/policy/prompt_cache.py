"""Send each prompt through the model once when sampling, and let all its responses use its keys and values.

Prompts are left-padded, so that every response starts at the same index of the cache.

Shapes: Q prompts, B responses, P padded prompt length, S tokens in the cache, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# For how many more tokens a new buffer of keys and values has space.
SPARE_TOKENS = 64


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Return whether the model's cache holds keys and values only, which can be repeated for each response.

    This excludes models with recurrent or convolutional layers, which have other states.
    """
    layers = DynamicCache(config=model.config).layers
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Send the prompts (token ids) through the model as one batch.

    Returns:
        The logits (Q, V) after each prompt; the cache, with the prompts' keys and values; and the attention
        mask (Q, P), which is 1 for the prompts' tokens and 0 for padding.
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
            cache.layers[i] = PreallocatedLayer()
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # the first token of a prompt has position 0
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, cache, mask


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
    """A layer's keys and values in buffers with space for more tokens. It serves sampling, without gradients.

    transformers' own layer copies all keys and values to append a token. Under autocast it also keeps them in
    float32, which attention then converts for every token; this one keeps them in the autocast type.
    """

    # Buffers (B, heads, S + spare, head width) of keys and of values; self.keys and self.values are views of
    # their first S tokens. None: there are none, or the batch has changed since.
    _buffers: list[torch.Tensor] | None = None
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, heads, new tokens, width), and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._buffers = [
                _new_buffer(self.keys, key_states, end),
                _new_buffer(self.values, value_states, end),
            ]
        key_buffer, value_buffer = self._buffers
        key_buffer[:, :, start:end] = key_states
        value_buffer[:, :, start:end] = value_states
        self.keys, self.values = key_buffer[:, :, :end], value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None


def _new_buffer(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """Return a buffer for length + SPARE_TOKENS tokens that begins with the old ones (B, heads, S, width)."""
    device = new.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else new.dtype
    buffer = new.new_empty(*new.shape[:2], length + SPARE_TOKENS, new.shape[3], dtype=dtype)
    if old.numel():  # nothing before the first update
        buffer[:, :, : old.shape[2]] = old
    return buffer
