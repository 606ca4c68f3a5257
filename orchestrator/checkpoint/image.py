"""One rank's file in host memory: a safetensors file whose layout never changes between saves."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.format import KINDS
from orchestrator.checkpoint.tensors import byte_view, safetensors_dtype
from orchestrator.checkpoint.zero import OwnedFragment
from orchestrator.errors import RunError


class FileImage:
    """Where each tensor lies in the file, and the bytes as of the last :meth:`snapshot`.

    Args:
        fragments: trainable parameters, with master and moments.
        frozen: parameters that are not trained.
        whole: buffers (``buffer/<name>``) and random state (``random/<name>``), written as they are.
    """

    def __init__(
        self, fragments: Sequence[OwnedFragment], frozen: Sequence[OwnedFragment], whole: dict[str, Tensor]
    ) -> None:
        self._fragments, self._frozen, self._whole = fragments, frozen, whole
        # Kind by kind, not parameter by parameter: an export, or a new run, reads the masters alone, in one piece.
        tensors = [
            *((f"{kind}/{f.parameter}", f.tensors[kind]) for kind in KINDS for f in fragments),
            *((f"frozen/{f.parameter}", f.tensors["frozen"]) for f in frozen),
            *whole.items(),
        ]
        # Wide elements first, as safetensors itself does, so that each tensor is aligned to its own.
        self._tensors = sorted(tensors, key=lambda item: -item[1].element_size())
        header, self._offsets = {}, {}
        position = 0
        for name, tensor in self._tensors:
            size = tensor.numel() * tensor.element_size()
            dtype, shape = safetensors_dtype(tensor.dtype), list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            self._offsets[name] = position
            position += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        head = struct.pack("<Q", len(encoded)) + encoded
        self._data_start = len(head)
        self.size_bytes = self._data_start + position
        # Zeroed, so that the first save does not pay for the pages either.
        self._bytes = torch.zeros(self.size_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.data = byte_view(self._bytes)
        self.data[: len(head)] = head

    def snapshot(self, whole: dict[str, Tensor]) -> None:
        """Copy every tensor's present value into the buffer.

        Args:
            whole: as at construction; the tensors may be others by now.

        Raises:
            RunError: one of them has another shape or dtype.
        """
        self._require_same(whole)
        self._tensors = [(name, whole.get(name, tensor)) for name, tensor in self._tensors]
        for name, tensor in self._tensors:
            start = self._data_start + self._offsets[name]
            size = tensor.numel() * tensor.element_size()
            if tensor.device.type == "cpu":
                # A plain move of bytes: torch's copy takes a third longer, since tensors in the file are not aligned
                # to cache lines.
                self.data[start : start + size] = byte_view(tensor)
            elif size:
                target = self._bytes[start : start + size].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _require_same(self, whole: dict[str, Tensor]) -> None:
        for name, before in self._whole.items():
            now = whole.get(name)
            if now is None or (now.shape, now.dtype) != (before.shape, before.dtype):
                raise RunError(
                    f"{name} was {before.dtype} of shape {tuple(before.shape)} and is another tensor now.",
                    next_step="Keep its shape and dtype, or register the buffer with persistent=False.",
                )

    def describe(self) -> dict[str, Any]:
        """Where everything lies in the file, for the manifest."""
        return {
            "fragments": [
                {
                    "parameter": f.parameter,
                    "start": f.start,
                    "length": f.length,
                    "offsets": {kind: self._offset(f"{kind}/{f.parameter}") for kind in KINDS},
                }
                for f in self._fragments
            ],
            "frozen": [
                {
                    "parameter": f.parameter,
                    "start": f.start,
                    "length": f.length,
                    "offset": self._offset(f"frozen/{f.parameter}"),
                }
                for f in self._frozen
            ],
            "whole": {
                name: {
                    "dtype": safetensors_dtype(tensor.dtype),
                    "shape": list(tensor.shape),
                    "size_bytes": tensor.numel() * tensor.element_size(),
                    "offset": self._offset(name),
                }
                for name, tensor in self._whole.items()
            },
        }

    def _offset(self, name: str) -> int:
        return self._data_start + self._offsets[name]


def share(fragments: list[OwnedFragment], *, rank: int, world_size: int) -> list[OwnedFragment]:
    """What one rank writes of tensors that every rank holds whole: an equal run of each parameter."""
    shared = []
    for f in fragments:
        size = -(-f.length // world_size)
        start = min(rank * size, f.length)
        length = min(size, f.length - start)
        if length > 0:
            tensors = {kind: tensor.narrow(0, start, length) for kind, tensor in f.tensors.items()}
            shared.append(OwnedFragment(parameter=f.parameter, start=f.start + start, length=length, tensors=tensors))
    return shared
