"""How many floating-point operations a token costs in training, by the model's own parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of configs whose models send a token to some of their parameters only."""


def flops_per_token(model: nn.Module, *, sequence_length: int) -> float | None:
    """Forward and backward, without activations that are computed again: 6 for each parameter that a token is
    multiplied with, and 12 x layers x width x ``sequence_length`` of attention. A frozen parameter costs 4: no gradient
    of its own is computed. Rows that an embedding looks up are multiplied with nothing.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. Attention counts in full, as there, though half of it is masked.

    Returns:
        None where the model is no transformer that tells its layers and width, or has experts.
    """
    config = getattr(model, "config", None)
    layers, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not layers or not width or any(getattr(config, name, None) for name in _EXPERTS):
        return None
    looked_up = _looked_up(model)
    weights = sum(
        parameter.numel() * (6 if parameter.requires_grad else 4)
        for parameter in model.parameters()
        if id(parameter) not in looked_up
    )
    return float(weights + 12 * layers * width * sequence_length)


def _looked_up(model: nn.Module) -> set[int]:
    """Parameters of embeddings that are not the output's too."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    shared = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(parameter) for table in tables for parameter in table.parameters()} - shared
