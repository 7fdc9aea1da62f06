"""Attention over a packed row, in which the responses of a group share their prompt's keys and values.

A packed row holds every token of a forward pass once: each prompt, then its responses, group after group.
Nothing is padded and no prompt is repeated. All layers but attention treat each token by itself, so they work
on the packed row as it is. Attention is where tokens interact. There, a prompt attends causally to itself,
and a response attends to its prompt and causally to itself:

    softmax([q k_prompt | q k_own] * scaling) [v_prompt | v_own]

This is fast because the group's response tokens all meet the prompt's one copy of keys in one attention call.
A second call has each response attend to itself, and the two results are joined under a common softmax. The
scores are recomputed in backward and never kept.

This module switches a model to this attention and chooses the kernel that computes it: that of
varlen_attention.py on GPUs, those of padded_attention.py elsewhere.

Shapes: N packed tokens; heads of queries; K heads of keys and values; D head width.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from gspo.policy.expert_routing import same_routing
from gspo.policy.packed_rows import PackedGroups
from gspo.policy.padded_attention import FlashKernel, PlainKernel
from gspo.policy.planned_device import device_type, gpu_has_flash_attention
from gspo.policy.prompt_cache import can_share_prompts
from gspo.policy.varlen_attention import VarlenKernel, fits_varlen

# The name under which transformers knows this attention.
ATTENTION_NAME = "gspo_groups"
# The model and the groups of the packed pass in progress; None: there is none.
_pass: tuple[PreTrainedModel, PackedGroups] | None = None


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether the model's forward pass can take a packed row.

    The tokens of such a model interact only in plain attention, called through transformers' interface. This
    excludes models with recurrent or convolutional layers, attention in chunks or attention sinks. It also
    excludes models of which a layer is in training mode and may apply dropout. The layers that
    enable_gradient_checkpointing() puts into training mode do not.
    """
    if not model._supports_attention_backend:
        return False
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return (
        set(layer_types or ()) <= {"full_attention", "sliding_attention"}
        and can_share_prompts(model)
        and "position_ids" in inspect.signature(model.forward).parameters
        and not any(hasattr(module, "sinks") for module in model.modules())
        and all(_recomputes_packed(module) for module in model.modules() if module.training)
    )


def _recomputes_packed(module: torch.nn.Module) -> bool:
    """Return whether the module is checkpointed, and recomputed with the packed row of its forward pass."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(checkpoint, "keywords", {}).get("context_fn") is checkpoint_contexts


@contextmanager
def packed_attention(model: PreTrainedModel, groups: PackedGroups) -> Iterator[None]:
    """Make the model's attention treat its input as groups.input_ids, for the forward passes inside."""
    global _pass
    AttentionInterface.register(ATTENTION_NAME, _attention)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation, _pass
    config._attn_implementation, _pass = ATTENTION_NAME, (model, groups)
    try:
        yield
    finally:
        config._attn_implementation, _pass = before


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed layer's forward pass and of its recomputation.

    This is the `context_fn` of torch.utils.checkpoint, which calls it before each layer. Backward recomputes
    the layer when packed_attention() has long ended, so the second context switches it on again, with the
    groups of this pass. The layer has the same experts again, too.
    """
    packed = nullcontext() if _pass is None else packed_attention(*_pass)
    return nullcontext(), _both(packed, same_routing())


@contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield


def _attention(
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
    assert _pass is not None, f"{ATTENTION_NAME} computes packed passes only"
    assert not dropout and s_aux is None and position_bias is None, "can_pack() should have refused the model"
    _, groups = _pass
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device, model_dtype = query.device.type, query.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model_dtype
    kernel = choose_kernel(
        query.device, dtype, scaling, sliding_window, softcap, key.shape[-1], value.shape[-1]
    )
    if isinstance(kernel, FlashKernel):
        dtype = torch.float32
    # (N, heads or K, D)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    output = kernel.attend(query, key, value, groups)
    return output[None].to(model_dtype), None


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    scaling: float,
    window: int | None,
    softcap: float | None,
    key_width: int,
    value_width: int,
) -> FlashKernel | VarlenKernel | PlainKernel:
    """Return the kernel for a layer's attention; inside planned_device(), that of the planned device.

    Three cases are left to plain tensor operations on a GPU: float32, head widths that flash attention lacks,
    and a soft cap (Gemma 2). FlexAttention could compute a soft cap, but not its gradient on a CPU, so
    neither the tests nor the plan of memory could run it.

    Args:
        dtype: the type that attention is to be computed in.
        window: how many tokens back a token sees, itself included; None: all of them.
        softcap: scores are bounded by softcap * tanh(score / softcap); None: they are not.
    """
    plain_softmax = window is None and softcap is None and key_width == value_width
    if device_type(device) == "cpu" and plain_softmax:
        return FlashKernel(scaling)
    if gpu_has_flash_attention(device) and fits_varlen(dtype, softcap, key_width, value_width):
        return VarlenKernel(scaling, window)
    return PlainKernel(scaling, window, softcap)
