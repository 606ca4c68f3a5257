"""A stand-in for the adapter to DeepSpeed: any cut of any parameters, in plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.checkpoint.format import KINDS, State
from orchestrator.checkpoint.zero import OwnedFragment


class FakeState:
    """What one of ``world_size`` ranks holds of ``full``, cut evenly into runs of elements as ZeRO does."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, rank: int = 0, world_size: int = 1) -> None:
        self.shapes, self.is_replicated = shapes, False
        self.optimizer_step, self.num_refreshed = 0, 0
        self._fragments = []
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            size = -(-numel // world_size)
            start = min(numel, rank * size)
            length = min(size, numel - start)
            if length:
                tensors = {kind: torch.zeros(length) for kind in KINDS}
                self._fragments.append(OwnedFragment(parameter=name, start=start, length=length, tensors=tensors))

    def fragments(self) -> list[OwnedFragment]:
        return self._fragments

    def refresh(self) -> None:
        self.num_refreshed += 1

    def fill(self, full: dict[str, dict[str, Tensor]]) -> None:
        for f in self._fragments:
            for kind in KINDS:
                f.tensors[kind].copy_(full[f.parameter][kind][f.start : f.start + f.length])


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
