"""How vLLM serves a version, where it is the engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class VllmSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Of each version; what each takes of GPUs follows from ``engine_kwargs``."""
    accelerator_type: str | None = None
    """In Ray's words, such as ``A10G``; null takes any GPU."""
    engine_kwargs: dict[str, Any] = Field(default={})
    """vLLM's own arguments, such as ``{max_model_len: 8192, tensor_parallel_size: 2}``."""
    max_start_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """The longest time until a version's application runs; past it, it is taken away and started anew."""
