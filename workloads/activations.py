"""Activation checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from torch import nn

from orchestrator.errors import RunError


def checkpoint_activations(model: nn.Module) -> None:
    """Have a transformers model keep only the input of each layer. Call it before the engine wraps the model.

    Raises:
        RunError: the model cannot.
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise RunError(
            f"train.activation_checkpointing is set, and {type(model).__name__} does not support it.",
            next_step="Set train.activation_checkpointing: false, or lower train.micro_batch_size to save memory.",
        )
    # Reentrant checkpoints lose the gradient of layers whose input needs none, as behind a frozen embedding.
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
