"""The header of a safetensors file: where each tensor's bytes lie. Pure.

Format: 8 bytes of little-endian length, so many bytes of JSON, then the tensors' bytes without a gap
(huggingface/safetensors, README, "Format"). Nothing is taken on trust: what the file says of itself is checked before
a byte of it is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.checkpoint.format import DTYPE_BYTES, MAX_DIMENSIONS, MAX_SIZE
from orchestrator.errors import RunError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""


class HeaderTensor(BaseModel):
    """One tensor's entry. ``data_offsets`` count from the header's end."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class StoredTensor(BaseModel):
    """One tensor of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the file's start."""


def read_header(read: Callable[[int, int], bytes], size_bytes: int, *, source: str) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Args:
        read: takes a start and a number of bytes.
        size_bytes: the file's.
        source: what errors call it.

    Raises:
        RunError: it is no safetensors file, or it says what cannot be.
    """
    head = read(0, min(LENGTH_BYTES, size_bytes))
    length = struct.unpack("<Q", head)[0] if len(head) == LENGTH_BYTES else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES):
        raise _refused(source, f"it says that its header has {length} bytes, and the file has {size_bytes}")
    entries = _parse(read(LENGTH_BYTES, length), source)
    start = LENGTH_BYTES + length
    tensors = {name: _tensor(name, entry, start, source) for name, entry in entries.items()}
    _require_whole(tensors, start, size_bytes, source)
    return tensors


def _parse(data: bytes, source: str) -> dict[str, Any]:
    try:
        entries = json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as e:
        raise _refused(source, f"its header is not JSON ({e})") from e
    if not isinstance(entries, dict):
        raise _refused(source, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(name: str, entry: Any, start: int, source: str) -> StoredTensor:
    try:
        said = HeaderTensor.model_validate(entry)
    except ValidationError as e:
        raise _refused(source, f"tensor {name} lacks a dtype, a shape, or its data_offsets") from e
    if said.dtype not in DTYPE_BYTES:
        raise RunError(
            f"model.pretrained: {source}: tensor {name} has dtype {said.dtype}, which cannot be trained from.",
            next_step=f"Give weights in F32, BF16 or F16; of others only {', '.join(DTYPE_BYTES)} are stored.",
        )
    # Before any product of sizes: that of many huge ones would take hours.
    if len(said.shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_SIZE for size in said.shape):
        raise _refused(source, f"tensor {name} has a shape that cannot be")
    size_bytes = math.prod(said.shape) * DTYPE_BYTES[said.dtype]
    if len(said.data_offsets) != 2 or said.data_offsets[1] - said.data_offsets[0] != size_bytes:
        raise _refused(
            source, f"tensor {name}, {said.dtype} {said.shape}, takes {size_bytes} bytes, not {said.data_offsets}"
        )
    return StoredTensor(dtype=said.dtype, shape=tuple(said.shape), offset=start + said.data_offsets[0])


def _require_whole(tensors: dict[str, StoredTensor], start: int, size_bytes: int, source: str) -> None:
    """The tensors cover the file from ``start`` to its end, each byte once."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, num_bytes(item[1]))):
        if tensor.offset != position:
            raise _refused(source, f"tensor {name} begins at byte {tensor.offset}, not at {position}")
        position += num_bytes(tensor)
    if position != size_bytes:
        raise _refused(source, f"its tensors end at byte {position}, and the file has {size_bytes}")


def num_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _refused(source: str, why: str) -> RunError:
    return RunError(
        f"model.pretrained: {source} is not a sound safetensors file: {why}.",
        next_step="Was it copied whole? Fetch it again, or save the model again with save_pretrained.",
    )
