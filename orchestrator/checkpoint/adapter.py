"""Fine-tuned models: the pretrained weights that they build on, the trained parts beside them, and peft's names.

Under peft a model's parameters carry its wrappers in their names::

    base_model.model.lm.q_proj.base_layer.weight                lm.q_proj.weight, as the pretrained model calls it
    base_model.model.lm.q_proj.lora_A.default.weight            trained beside it, and so is lora_B
    base_model.model.score.modules_to_save.default.weight       score.weight, trained in place of
    base_model.model.score.original_module.weight               what it was
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_WRAPPED = "base_model.model."
_REPLACED = ".original_module."
_ADAPTER = r"\.default(?=\.|$)"
"""peft's name for the only adapter that a model has here."""
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class BaseReference(BaseModel):
    """Pretrained weights in the store, by what they hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of all their files, as the base's own manifest gives it."""


class LoraPair(BaseModel):
    """The trained parameters beside a frozen weight W, which acts as W + ``scale`` * B A."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: str
    """Of shape (rank, inputs)."""
    b: str
    """Of shape (outputs, rank)."""
    scale: float
    transposed: bool = False
    """Whether W is stored as (inputs, outputs), as GPT-2 does, and not as (outputs, inputs)."""

    def require_fit(self, weight: tuple[int, ...], a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> None:
        """
        Raises:
            ValueError: B A has not the weight's shape, or one of them is not trained (None).
        """
        shape = weight[::-1] if self.transposed else weight
        if a is None or b is None or len(a) != 2 or len(b) != 2:
            raise ValueError(f"{self.a} and {self.b} are no two trained matrices")
        if (b[0], a[1]) != shape or b[1] != a[0]:
            raise ValueError(f"{b} times {a} is not {shape}")


def plain_name(name: str) -> str:
    """What a parameter under peft is called in the model that peft wraps. Other names stay as they are."""
    if not name.startswith(_WRAPPED):
        return name
    inner = re.sub(rf"\.modules_to_save{_ADAPTER}", "", name.removeprefix(_WRAPPED))
    return inner.replace(".base_layer.", ".").replace(_REPLACED, ".")


def saved_name(name: str) -> str:
    """What peft calls a trained parameter in its own files, which name no adapter."""
    return re.sub(_ADAPTER, "", name).replace(".modules_to_save.", ".")


def is_replaced(name: str) -> bool:
    """Whether a parameter is the original of a module that is trained as a copy, so that the model never uses it."""
    return name.startswith(_WRAPPED) and _REPLACED in name
