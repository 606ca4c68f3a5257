"""The checkpoint's manifest and the index that makes any byte range verifiable by itself.

``runs/<run>/checkpoints/step-00000100/manifest.json`` lists one safetensors file per rank. Tensors in it are the
1-D fp32 *fragments* of the flattened parameters that the rank owns: ``fp32/<parameter>``, ``exp_avg/<parameter>``
and ``exp_avg_sq/<parameter>``. Beside each file lies its index: the SHA-256 of every 64 KiB block, 32 bytes each,
one after the other; the manifest holds the index's own digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrator.errors import IntegrityError

BLOCK_BYTES = 64 * 1024
DIGEST_BYTES = 32
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""Master weights and Adam's two moments."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankFile(_Frozen):
    """One rank's data. Keys are relative to the checkpoint's folder."""

    key: str
    size_bytes: int
    index_key: str
    index_sha256: str

    @model_validator(mode="after")
    def _plain_keys(self) -> RankFile:
        for key in (self.key, self.index_key):
            if key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
                raise ValueError(f"{key!r} is not a plain relative key")
        if self.size_bytes < 0:
            raise ValueError("size_bytes is negative")
        return self


class Fragment(_Frozen):
    """Elements ``start … start + length - 1`` of a flattened parameter, and where their bytes lie."""

    file: int
    start: int
    length: int
    offsets: dict[Literal["fp32", "exp_avg", "exp_avg_sq"], int]


class Parameter(_Frozen):
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Buffer(_Frozen):
    """A persistent buffer of the model, written once."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    size_bytes: int


class State(_Frozen):
    """The scalars: everything besides tensors that the next step depends on.

    Random numbers need no state: each step seeds them from (seed, step, rank).
    """

    step: int
    tokens: int
    loss: float
    """Mean loss of the step that was taken last."""
    precision: Literal["fp32", "bf16", "fp16"]
    optimizer_step: int
    loss_scaler: dict[str, float | int | bool] | None = None
    spec_sha256: str
    dataset_fingerprint: str


class Manifest(_Frozen):
    format: Literal["headway/checkpoint/1"] = "headway/checkpoint/1"
    run_id: str
    attempt: int
    nonce: str
    world_size: int
    block_bytes: Literal[65536] = 65536
    created_s: float
    state: State
    files: tuple[RankFile, ...]
    parameters: dict[str, Parameter]
    buffers: dict[str, Buffer]

    @model_validator(mode="after")
    def _covers_every_element_once(self) -> Manifest:
        for name, parameter in self.parameters.items():
            _check_parameter(name, parameter, self.files)
        for name, buffer in self.buffers.items():
            _check_buffer(name, buffer)
            _check_span(f"buffer {name}", buffer.file, buffer.offset, buffer.size_bytes, self.files)
        return self

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def _check_buffer(name: str, buffer: Buffer) -> None:
    if min(buffer.shape, default=0) < 0:
        raise ValueError(f"buffer {name}: there is no shape {buffer.shape}")
    if DTYPE_BYTES.get(buffer.dtype, -1) * math.prod(buffer.shape) != buffer.size_bytes:
        raise ValueError(f"buffer {name}: {buffer.dtype} {buffer.shape} does not take {buffer.size_bytes} bytes")


def _check_parameter(name: str, parameter: Parameter, files: tuple[RankFile, ...]) -> None:
    if min(parameter.shape, default=0) < 0:
        raise ValueError(f"parameter {name}: there is no shape {parameter.shape}")
    position = 0
    for fragment in sorted(parameter.fragments, key=lambda f: f.start):
        if fragment.start != position or fragment.length < 1:
            raise ValueError(f"parameter {name}: elements from {position} on are missing or given twice")
        if set(fragment.offsets) != set(KINDS):
            raise ValueError(f"parameter {name}: a fragment lacks one of {', '.join(KINDS)}")
        for offset in fragment.offsets.values():
            _check_span(f"parameter {name}", fragment.file, offset, 4 * fragment.length, files)
        position += fragment.length
    if position != parameter.numel:
        raise ValueError(f"parameter {name}: {position} of {parameter.numel} elements are there")


def _check_span(what: str, file: int, offset: int, size_bytes: int, files: tuple[RankFile, ...]) -> None:
    if not 0 <= file < len(files):
        raise ValueError(f"{what}: there is no file {file}")
    if offset < 0 or size_bytes < 0 or offset + size_bytes > files[file].size_bytes:
        raise ValueError(f"{what}: bytes {offset}+{size_bytes} lie outside {files[file].key}")


def parse_manifest(document: Any, *, source: str) -> Manifest:
    """Check a manifest before anything in it is used.

    Raises:
        IntegrityError: it is not one, or it describes bytes that cannot be.
    """
    try:
        return Manifest.model_validate(document)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{source} is not a headway/checkpoint/1 manifest: {where} {first['msg']}.") from e


def block_index(data: memoryview | bytes) -> bytes:
    """SHA-256 of each 64 KiB block of ``data``, one after the other."""
    view = memoryview(data)
    return b"".join(
        hashlib.sha256(view[start : start + BLOCK_BYTES]).digest() for start in range(0, len(view), BLOCK_BYTES)
    )


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Whole blocks that cover a byte range."""

    first: int
    start: int
    stop: int


def covering_blocks(start: int, num_bytes: int, file_bytes: int) -> Blocks:
    first = start // BLOCK_BYTES
    stop = min(file_bytes, -(-(start + num_bytes) // BLOCK_BYTES) * BLOCK_BYTES)
    return Blocks(first=first, start=first * BLOCK_BYTES, stop=stop)


def verify_blocks(data: bytes, first_block: int, index: bytes, *, source: str) -> None:
    """Check whole blocks that start at ``first_block`` against the file's index.

    Raises:
        IntegrityError: naming the first block that differs.
    """
    for number, start in enumerate(range(0, len(data), BLOCK_BYTES), first_block):
        expected = index[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        if hashlib.sha256(memoryview(data)[start : start + BLOCK_BYTES]).digest() != expected:
            raise IntegrityError(f"{source}: block {number} (64 KiB from byte {number * BLOCK_BYTES}) is damaged.")


def num_blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def overlaps(parameter: Parameter, start: int, length: int) -> Iterator[tuple[Fragment, int, int]]:
    """Stored fragments that hold elements ``start … start + length - 1``.

    Yields:
        (fragment, first element within the fragment, number of elements)
    """
    stop = start + length
    for fragment in parameter.fragments:
        low, high = max(start, fragment.start), min(stop, fragment.start + fragment.length)
        if low < high:
            yield fragment, low - fragment.start, high - low
