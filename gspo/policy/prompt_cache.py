"""Run each prompt once in sampling, and let all of its responses attend to its keys and values.

Prompts are left-padded, so that every response starts at the same place in the cache.

Shapes: Q prompts, B responses, P padded prompt length, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens that a layer's keys and values may still take when they are laid out anew.
ROOM = 64


def can_share_prompts(model) -> bool:
    """Whether the state that a prompt leaves is keys and values alone, which can be repeated by rows."""
    layers = DynamicCache(config=model.config).layers
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def run_prompts(model, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Logits (Q, V) after each prompt, the cache, and the mask (Q, P) of the prompts' own tokens."""
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (Q, P)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)  # (Q, P)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    mask = mask.to(device)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, cache, mask


def decoding_mask(model, cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """The mask (B, S) of the tokens that the next one sees, as the model takes it with least work.

    Where every layer sees everything, that is (B, 1, 1, S) to add to the scores, in the compute type: a 0 / 1
    mask would be converted in every layer, at every token.
    """
    if not (model._supports_attention_backend and all(type(layer) is RoomyLayer for layer in cache.layers)):
        return mask
    added = torch.zeros(mask.shape, dtype=cache.layers[0].keys.dtype, device=mask.device)
    return added.masked_fill_(mask == 0, -torch.inf)[:, None, None]


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, in the compute type; without gradients.

    transformers' own layer copies everything to append a token, and keeps float32 under autocast, which
    attention then casts at every token.
    """

    # Keys and values (B, heads, S + room, head width); self.keys and self.values are their first S.
    _rooms = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self._rooms is None or end > self._rooms[0].shape[2]:
            self._rooms = [
                _with_room(kept, new, end)
                for kept, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._rooms = None

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._rooms = None


def _with_room(kept: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """What is kept (B, heads, S, width), or nothing yet, in a buffer for length + ROOM tokens."""
    device = new.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else new.dtype
    room = new.new_empty(*new.shape[:2], length + ROOM, new.shape[3], dtype=dtype)
    if kept.numel():
        room[:, :, : kept.shape[2]] = kept
    return room
