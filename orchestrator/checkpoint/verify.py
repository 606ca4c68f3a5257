"""Reading every byte of a checkpoint to see whether it is what was written. Needs no torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.base import open_base, require_files
from orchestrator.checkpoint.catalog import Folder, read_manifest
from orchestrator.checkpoint.format import DTYPE_BYTES, KINDS, MAX_DIMENSIONS, MAX_SIZE, Manifest
from orchestrator.checkpoint.reader import CheckpointReader, Piece
from orchestrator.errors import IntegrityError
from orchestrator.store import Store

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows."""
Span = tuple[str, int, int]
"""A tensor's dtype, and its first byte and the one after its last, counted from the file's start."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    num_files: int
    num_bytes: int


def verify(store: Store, folder: Folder) -> Verified:
    """Check a committed checkpoint to the last byte.

    Checked are the manifest against its own digest, each index against the manifest, each block against its index, and
    each file's safetensors header against the manifest. Pretrained weights that it refers to must be there, of
    the right size, and are not read.

    Raises:
        IntegrityError, NotFound: naming the first bad part.
    """
    manifest, _ = read_manifest(store, folder)
    reader = CheckpointReader(store, folder, manifest)
    reader.check_indexes()
    if manifest.base is not None:
        require_files(store, open_base(store, manifest.base))
    for number, file in enumerate(manifest.files):
        reader.check_file(number)
        require_same_tensors(_read_header(reader, number), expected_tensors(manifest, number), source=file.key)
    return Verified(num_files=len(manifest.files), num_bytes=reader.bytes_read)


def _read_header(reader: CheckpointReader, number: int) -> dict[str, Span]:
    file = reader.manifest.files[number]
    length = memoryview(bytearray(min(8, file.size_bytes)))
    reader.read([Piece(file=number, start=0, target=length)])
    size = header_bytes(bytes(length), file_bytes=file.size_bytes, source=reader.uri_of(file))
    data = memoryview(bytearray(size))
    reader.read([Piece(file=number, start=8, target=data)])
    return parse_header(bytes(data), file_bytes=file.size_bytes, source=reader.uri_of(file))


def header_bytes(data: bytes, *, file_bytes: int, source: str) -> int:
    """The length of a safetensors header, from the first 8 bytes of the file.

    Raises:
        IntegrityError: no such file can be.
    """
    size = struct.unpack("<Q", data)[0] if len(data) == 8 else -1
    if not 2 <= size <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise IntegrityError(f"{source} is no safetensors file: its header would take {size} bytes of {file_bytes}.")
    return int(size)


def parse_header(data: bytes, *, file_bytes: int, source: str) -> dict[str, Span]:
    """A safetensors header's tensors by name, checked to lie in the file, apart from each other.

    Raises:
        IntegrityError: the header lies about the file, or is none.
    """
    try:
        document = json.loads(data)
        document.pop("__metadata__", None)
        found = {name: _span(entry, 8 + len(data), file_bytes) for name, entry in document.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as e:
        raise IntegrityError(f"{source} is no safetensors file: {e}.") from e
    position = 8 + len(data)
    for name, (_, start, stop) in sorted(found.items(), key=lambda item: item[1][1:]):
        if start != position or stop > file_bytes:
            raise IntegrityError(f"{source}: {name} lies at bytes {start} to {stop}, where it cannot.")
        position = stop
    if position != file_bytes:
        raise IntegrityError(f"{source}: its last {file_bytes - position} bytes belong to no tensor.")
    return found


def _span(entry: dict[str, Any], data_start: int, file_bytes: int) -> Span:
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    # Sizes are looked at before they are multiplied: the product of many huge ones would take hours.
    numbers = [start, stop, *shape]
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers):
        raise ValueError("an offset or a size is none")
    if stop > file_bytes - data_start or stop - start != DTYPE_BYTES[entry["dtype"]] * math.prod(shape):
        raise ValueError("a tensor's shape, dtype and offsets contradict each other, or the file's size")
    return entry["dtype"], data_start + start, data_start + stop


def expected_tensors(manifest: Manifest, number: int) -> dict[str, Span]:
    """What the manifest says of one file's tensors. Pure."""
    return dict(_expected(manifest, number))


def _expected(manifest: Manifest, number: int) -> Iterator[tuple[str, Span]]:
    for name, parameter in manifest.parameters.items():
        for fragment in parameter.fragments:
            for kind in KINDS if fragment.file == number else ():
                start = fragment.offsets[kind]  # type: ignore[index]
                yield f"{kind}/{name}", ("F32", start, start + 4 * fragment.length)
    for name, frozen in manifest.frozen.items():
        for piece in frozen.fragments:
            if piece.file == number:
                size = DTYPE_BYTES[frozen.dtype] * piece.length
                yield f"frozen/{name}", (frozen.dtype, piece.offset, piece.offset + size)
    for kind, whole in (("buffer", manifest.buffers), ("random", manifest.random)):
        for name, buffer in whole.items():
            if buffer.file == number:
                yield f"{kind}/{name}", (buffer.dtype, buffer.offset, buffer.offset + buffer.size_bytes)


def require_same_tensors(found: dict[str, Span], expected: dict[str, Span], *, source: str) -> None:
    """
    Raises:
        IntegrityError: naming the first tensor that differs.
    """
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise IntegrityError(
                f"{source}: its header has {name} at {found.get(name)}, the manifest at {expected.get(name)}."
            )
