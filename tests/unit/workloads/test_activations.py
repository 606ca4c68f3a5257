from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from orchestrator.errors import RunError
from workloads.activations import checkpoint_activations


def saved_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=torch.arange(32)[None], use_cache=False)
    assert output.logits.requires_grad
    return sum(kept.values())


def test_only_the_layers_inputs_are_kept() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32").train()
    plain = saved_bytes(model)
    checkpoint_activations(model)
    assert saved_bytes(model) < plain / 5


def test_a_model_that_cannot_is_refused() -> None:
    with pytest.raises(RunError, match="activation_checkpointing is set, and Linear does not support it"):
        checkpoint_activations(nn.Linear(1, 1))
