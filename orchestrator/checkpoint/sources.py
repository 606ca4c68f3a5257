"""Where an exported tensor's elements come from: the checkpoint, the pretrained weights, or both, merged. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.checkpoint.adapter import LoraPair
from orchestrator.checkpoint.base import open_base
from orchestrator.checkpoint.catalog import Folder
from orchestrator.checkpoint.convert import convert
from orchestrator.checkpoint.format import DTYPE_BYTES, Manifest
from orchestrator.checkpoint.reader import CheckpointReader, Piece, frozen_pieces, pieces_of
from orchestrator.pretrained.reader import BasePiece, BaseReader
from orchestrator.store import Store

NUM_READERS = 2
"""Requests at once within a window; see :class:`CheckpointReader`."""


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """A tensor of an output file: where it is read, and as what and where it is written."""

    name: str
    source: str
    """What the manifest calls it."""
    kind: Literal["parameter", "frozen", "buffer"]
    """In the manifest. A frozen one may lie in the pretrained weights, and what was trained beside it is added."""
    stored: str
    """The dtype that it is read as."""
    dtype: str
    shape: tuple[int, ...]
    numel: int
    start: int = 0

    @property
    def size_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements ``start … start + length - 1`` of one tensor."""

    tensor: TensorLayout
    start: int
    length: int


class Weights:
    """Reads the tensors of one checkpoint as they are exported. To be used from one thread at a time.

    Args:
        base: the pretrained weights that the checkpoint refers to, None where it refers to none.
    """

    def __init__(self, checkpoint: CheckpointReader, base: BaseReader | None = None) -> None:
        self.manifest: Manifest = checkpoint.manifest
        self._checkpoint, self._base = checkpoint, base
        self._held: tuple[str, NDArray[np.float32], NDArray[np.float32]] | None = None

    def read(self, slices: Sequence[Slice]) -> list[memoryview]:
        """Each slice's bytes, in the dtype that it is written in.

        Raises:
            IntegrityError: damaged bytes. RunError: a value that the dtype cannot hold.
        """
        targets = [memoryview(bytearray(s.length * DTYPE_BYTES[s.tensor.stored])) for s in slices]
        parts = list(zip(slices, targets, strict=True))
        self._checkpoint.read([piece for part, target in parts for piece in self._pieces(part, target)])
        if self._base is not None:
            self._base.read([piece for part, target in parts for piece in self._base_pieces(part, target)])
        return [self._written(part, target) for part, target in parts]

    def _base_pieces(self, part: Slice, target: memoryview) -> Iterator[BasePiece]:
        frozen = self.manifest.frozen.get(part.tensor.source)
        if frozen is not None and frozen.base is not None:
            yield BasePiece(tensor=frozen.base, start=part.start, target=target, dtype=part.tensor.stored)

    def _written(self, part: Slice, data: memoryview) -> memoryview:
        stored, written, name = part.tensor.stored, part.tensor.dtype, part.tensor.name
        pair = self._pair(part.tensor.source)
        if pair is not None:
            data, stored = convert(data, stored, "F32", name=name), "F32"
            self._add_trained(part, pair, np.frombuffer(data, dtype=np.float32))
        return convert(data, stored, written, name=name)

    def _pair(self, source: str) -> LoraPair | None:
        frozen = self.manifest.frozen.get(source)
        return frozen.lora if frozen is not None else None

    def _pieces(self, part: Slice, target: memoryview) -> Iterator[Piece]:
        name = part.tensor.source
        if part.tensor.kind == "parameter":
            return pieces_of(self.manifest, name, "fp32", part.start, target)
        if part.tensor.kind == "frozen":
            return frozen_pieces(self.manifest, name, part.start, target)  # none where the base holds it
        whole = self.manifest.buffers[name]
        size = DTYPE_BYTES[whole.dtype]
        return iter([Piece(file=whole.file, start=whole.offset + part.start * size, target=target)])

    def _add_trained(self, part: Slice, pair: LoraPair, values: NDArray[np.float32]) -> None:
        """Add what LoRA trained: the rows of scale * B A that the slice cuts, in memory of the slice's own size."""
        left, right = self._factors(part.tensor.source, pair)
        num_columns = right.shape[1]
        first, last = part.start // num_columns, -(-(part.start + part.length) // num_columns)
        rows = (np.float32(pair.scale) * left[first:last]) @ right
        skip = part.start - first * num_columns
        values += rows.reshape(-1)[skip : skip + part.length]

    def _factors(self, name: str, pair: LoraPair) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The two matrices whose product has the weight's shape. A weight's slices come one after the other."""
        if self._held is None or self._held[0] != name:
            a, b = self._whole(pair.a), self._whole(pair.b)
            self._held = (name, a.T, b.T) if pair.transposed else (name, b, a)
        return self._held[1:]

    def _whole(self, name: str) -> NDArray[np.float32]:
        shape = self.manifest.parameters[name].shape
        values = np.empty(shape, dtype=np.float32)
        target = memoryview(values.reshape(-1).view(np.uint8).data)
        self._checkpoint.read(pieces_of(self.manifest, name, "fp32", 0, target))
        return values


def open_weights(store: Store, folder: Folder, manifest: Manifest) -> Weights:
    """
    Raises:
        IntegrityError: the checkpoint refers to pretrained weights that are gone, or others.
    """
    base = open_base(store, manifest.base) if manifest.base is not None else None
    return Weights(CheckpointReader(store, folder, manifest, num_readers=NUM_READERS), base)
