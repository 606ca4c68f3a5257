"""A stand-in for the adapter to DeepSpeed: any cut of any parameters, in plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.checkpoint.format import KINDS, State
from orchestrator.checkpoint.zero import OwnedFragment


class FakeState:
    """What one of ``world_size`` ranks holds of ``full``, cut evenly into runs of elements as ZeRO does.

    Frozen parameters are whole on each rank, or cut too where ``frozen_is_replicated`` is false.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        *,
        frozen_shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
        frozen_is_replicated: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shapes, self.is_replicated = shapes, False
        self.frozen_shapes, self.frozen_is_replicated = frozen_shapes or {}, frozen_is_replicated
        self.optimizer_step, self.num_refreshed = 0, 0
        self.loss_scaler: dict[str, float | int | bool] | None = None
        self._fragments, self._frozen = [], []
        for name, shape in shapes.items():
            start, length = _part(shape, rank, world_size)
            if length:
                tensors = {kind: torch.zeros(length) for kind in KINDS}
                self._fragments.append(OwnedFragment(parameter=name, start=start, length=length, tensors=tensors))
        for name, (dtype, shape) in self.frozen_shapes.items():
            start, length = _part(shape, rank, world_size) if not frozen_is_replicated else _part(shape, 0, 1)
            if length:
                tensors = {"frozen": torch.zeros(length, dtype=dtype)}
                self._frozen.append(OwnedFragment(parameter=name, start=start, length=length, tensors=tensors))

    def fragments(self) -> list[OwnedFragment]:
        return self._fragments

    def frozen(self) -> list[OwnedFragment]:
        return self._frozen

    def refresh(self) -> None:
        self.num_refreshed += 1

    def fill(self, full: dict[str, dict[str, Tensor]]) -> None:
        for f in self._fragments:
            for kind in KINDS:
                f.tensors[kind].copy_(full[f.parameter][kind][f.start : f.start + f.length])


def _part(shape: tuple[int, ...], rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of one rank's even part of a flattened parameter."""
    numel = torch.Size(shape).numel()
    size = -(-numel // world_size)
    start = min(numel, rank * size)
    return start, min(size, numel - start)


def random_values(shapes: dict[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Per parameter and kind, all its elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(torch.Size(shape).numel(), generator=generator) for kind in KINDS}
        for name, shape in shapes.items()
    }


def scalars(step: int) -> State:
    return State(
        step=step,
        tokens=step * 16,
        loss=3.0,
        precision="fp32",
        optimizer_step=step,
        spec_sha256="0" * 64,
        dataset_fingerprint="f",
    )
