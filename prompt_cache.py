"""Run each prompt once, and let all of its responses attend to its keys and values.

A group's prompt then costs one forward pass instead of one for each response, in sampling and in scoring.
Prompts are left-padded, so that every response starts at the same place in the cache.

Shapes: Q prompts, B responses, P padded prompt length, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache


def can_share_prompts(model) -> bool:
    """Whether the state that a prompt leaves is keys and values alone, which can be repeated by rows."""
    layers = DynamicCache(config=model.config).layers
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def run_prompts(model, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Logits (Q, V) after each prompt, the cache, and the mask (Q, P) of the prompts' own tokens.

    Differentiable where gradients are enabled: those of all responses meet in the cache.
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
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, cache, mask
