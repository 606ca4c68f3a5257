"""Pretrained weights, and checkpoints of what was trained beside them: two adapters and a head."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.checkpoint.adapter import BaseReference, LoraPair
from orchestrator.checkpoint.base import Origin
from orchestrator.checkpoint.resume import load_base
from orchestrator.pretrained.format import BaseManifest
from orchestrator.pretrained.source import list_base
from tests.unit.checkpoint.saving import finish, new_group, writer_of
from tests.unit.checkpoint.states import FakeState, random_values, scalars
from tests.unit.fakes import MemoryStore
from workloads.fetch_base import fetch_base

LORA = "base_model.model.lm.q.{}"
PAIR = LoraPair(a=LORA.format("lora_A.default.weight"), b=LORA.format("lora_B.default.weight"), scale=0.5)
CONV = "base_model.model.lm.c.{}"
CONV_PAIR = LoraPair(
    a=CONV.format("lora_A.default.weight"), b=CONV.format("lora_B.default.weight"), scale=2.0, transposed=True
)
HEAD = "base_model.model.score.{}.weight"
TRAINED: dict[str, tuple[int, ...]] = {
    PAIR.a: (2, 300), PAIR.b: (500, 2), CONV_PAIR.a: (3, 7), CONV_PAIR.b: (11, 3),
    HEAD.format("modules_to_save.default"): (2, 5),
}  # fmt: skip
FROZEN: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    LORA.format("base_layer.weight"): (torch.float32, (500, 300)),
    CONV.format("base_layer.weight"): (torch.float32, (7, 11)),
    "base_model.model.lm.norm.weight": (torch.bfloat16, (7,)),
    HEAD.format("original_module"): (torch.float32, (2, 5)),
}
TENSORS = {
    LORA.format("base_layer.weight"): "lm.q.weight",
    CONV.format("base_layer.weight"): "lm.c.weight",
    "base_model.model.lm.norm.weight": "norm.weight",
}


def base_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "lm.q.weight": torch.randn(500, 300, generator=generator),
        "lm.c.weight": torch.randn(7, 11, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(7, generator=generator),
    }


def make_base(store: MemoryStore, directory: Path, values: dict[str, Tensor]) -> BaseManifest:
    directory.mkdir()
    safetensors.torch.save_file(values, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return fetch_base(list_base(str(directory), store), store)


def origin(base: BaseManifest) -> Origin:
    return Origin(
        base=BaseReference(fingerprint=base.fingerprint, digest=base.digest),
        tensors=TENSORS,
        lora={LORA.format("base_layer.weight"): PAIR, CONV.format("base_layer.weight"): CONV_PAIR},
    )


def state_of(rank: int, *, world_size: int = 3) -> FakeState:
    return FakeState(TRAINED, frozen_shapes=FROZEN, frozen_is_replicated=False, rank=rank, world_size=world_size)


def save_adapter(store: MemoryStore, base: BaseManifest, *, step: int = 4, keep: int = 3) -> None:
    """A checkpoint by three ranks, who started from the base."""
    group, writers = new_group(store), []
    for rank in range(3):
        state = state_of(rank)
        load_base(store, origin(base), state, nn.Module())  # type: ignore[arg-type]
        state.fill(random_values(TRAINED))
        writers.append(writer_of(store, group, state, rank=rank, world_size=3, keep=keep, origin=origin(base)))
    for writer in writers:
        writer.save(scalars(step))
    assert [finish(writer).error for writer in writers] == [None] * 3
