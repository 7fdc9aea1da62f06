"""Gradient checkpointing: backward recomputes the activations of each layer, which saves memory."""

from torch import nn
from transformers import PreTrainedModel

from gspo.policy.group_attention import checkpoint_contexts


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, with dropout still off.

    transformers checkpoints a layer only while the layer is in training mode. Setting the whole model to
    training mode would also turn on the dropout that GPT-2 and others have. This function therefore sets only
    the layers themselves to training mode; the modules inside them stay in evaluation mode.
    """
    # A layer that attended to a packed row does so again when it is recomputed.
    settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 has renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
        if module.training:
            _disable_own_dropout(module)


def _disable_own_dropout(layer: nn.Module) -> None:
    """Set the layer's dropout probabilities to 0: OPT's layers apply dropout themselves when in training."""
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
