"""The checkpoint's manifest and the index that makes any byte range verifiable by itself.

A checkpoint is one folder, ``runs/<run>/checkpoints/step-00000100/<attempt>-<group>-<nonce>/``, that one group of
workers wrote, and it exists when ``manifest.json`` in it does. Beside it lies one safetensors file per rank. Tensors
in it are the 1-D fp32 *fragments* of the flattened parameters that the rank owns: ``fp32/<parameter>``,
``exp_avg/<parameter>`` and ``exp_avg_sq/<parameter>``. Each file has an index: the SHA-256 of every 64 KiB block, 32
bytes each, one after the other; the manifest holds the index's own digest, and its own. The whole of it, for whoever
writes another reader: docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrator.checkpoint.adapter import BaseReference, LoraPair
from orchestrator.errors import IntegrityError
from orchestrator.spec import canonical_json

BLOCK_BYTES = 64 * 1024
DIGEST_BYTES = 32
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""Master weights and Adam's two moments."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""
MAX_DIMENSIONS, MAX_SIZE = 64, 2**63 - 1
"""What torch allows of a shape."""
MAX_MANIFEST_BYTES = 512 * 2**20
"""A larger one is refused unread. 723 parameters over 1,000 ranks take 80 MB."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankFile(_Frozen):
    """One rank's data. Keys are relative to the manifest's folder."""

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


class FrozenFragment(_Frozen):
    """Elements ``start … start + length - 1`` of a flattened parameter that is not trained."""

    file: int
    start: int
    length: int
    offset: int


class FrozenParameter(_Frozen):
    """A parameter that is not trained, in the model's own dtype; it has no moments."""

    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[FrozenFragment, ...] = ()
    base: str | None = None
    """The tensor of :attr:`Manifest.base` that holds it; then the checkpoint does not."""
    lora: LoraPair | None = None
    """What is trained beside it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


AnyFragment = TypeVar("AnyFragment", Fragment, FrozenFragment)


class Buffer(_Frozen):
    """A tensor that lies whole in one file: a persistent buffer of the model, or a rank's random state."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    size_bytes: int


class State(_Frozen):
    """The scalars: everything besides tensors that the next step depends on.

    A run's own random numbers need no state: each step seeds them from (seed, step, rank).
    """

    step: int
    tokens: int = 0
    loss: float | None = None
    """Mean loss of the step that was taken last."""
    precision: Literal["fp32", "bf16", "fp16"]
    optimizer_step: int
    loss_scaler: dict[str, float | int | bool] | None = None
    scheduler: dict[str, Any] | None = None
    """A learning-rate scheduler's own state, where the loop has one; a run's rate is a function of the step."""
    spec_sha256: str = ""
    dataset_fingerprint: str = ""
    extra: dict[str, Any] = {}
    """What the caller's own loop wants back: its data position, say."""


class Manifest(_Frozen):
    format: Literal["headway/checkpoint/1"] = "headway/checkpoint/1"
    run_id: str
    attempt: int
    group: int
    nonce: str
    world_size: int
    block_bytes: Literal[65536] = 65536
    created_s: float
    state: State
    files: tuple[RankFile, ...]
    parameters: dict[str, Parameter]
    frozen: dict[str, FrozenParameter] = {}
    base: BaseReference | None = None
    buffers: dict[str, Buffer] = {}
    random: dict[str, Buffer] = {}
    """Random state of each rank, as ``<rank>/<generator>``, where the loop asked for it."""

    @model_validator(mode="after")
    def _covers_every_element_once(self) -> Manifest:
        names = Counter([*self.parameters, *self.frozen, *self.buffers])
        if any(count > 1 for count in names.values()):
            raise ValueError(f"{names.most_common(1)[0][0]} is there twice")
        spans = _Spans(self.files)
        for name, parameter in self.parameters.items():
            _check_shape(f"parameter {name}", parameter.shape)
            _check_cover(f"parameter {name}", parameter.fragments, parameter.numel)
            for fragment in parameter.fragments:
                if set(fragment.offsets) != set(KINDS):
                    raise ValueError(f"parameter {name}: a fragment lacks one of {', '.join(KINDS)}")
                for offset in fragment.offsets.values():
                    spans.add(f"parameter {name}", fragment.file, offset, 4 * fragment.length)
        for name, frozen in self.frozen.items():
            _check_shape(f"frozen {name}", frozen.shape)
            self._check_origin(name, frozen)
            for piece in frozen.fragments:
                spans.add(f"frozen {name}", piece.file, piece.offset, _itemsize(frozen.dtype) * piece.length)
        for name, buffer in [*self.buffers.items(), *self.random.items()]:
            _check_shape(f"buffer {name}", buffer.shape)
            if _itemsize(buffer.dtype) * math.prod(buffer.shape) != buffer.size_bytes:
                raise ValueError(f"buffer {name}: {buffer.dtype} {buffer.shape} is not {buffer.size_bytes} bytes")
            spans.add(f"buffer {name}", buffer.file, buffer.offset, buffer.size_bytes)
        spans.require_disjoint()
        return self

    def _check_origin(self, name: str, frozen: FrozenParameter) -> None:
        """A frozen parameter lies here or in the base, and what is trained beside it has shapes that fit it."""
        if frozen.base is None:
            _check_cover(f"frozen {name}", frozen.fragments, frozen.numel)
        elif self.base is None or frozen.fragments:
            raise ValueError(f"frozen {name}: it lies in no base, or here too")
        if frozen.lora is not None:
            a, b = (p.shape if (p := self.parameters.get(part)) else None for part in (frozen.lora.a, frozen.lora.b))
            try:
                frozen.lora.require_fit(frozen.shape, a, b)
            except ValueError as e:
                raise ValueError(f"frozen {name}: {e}") from e

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def document(self) -> dict[str, Any]:
        """As JSON. Fields that came later are left out where they say nothing, so that older readers take it too."""
        found = self.model_dump(mode="json")
        frozen = {name: {k: v for k, v in f.items() if v is not None} for name, f in found["frozen"].items()}
        return {name: value for name, value in {**found, "frozen": frozen}.items() if (name, value) != ("base", None)}


class _Spans:
    """The byte ranges of each file that a manifest speaks of."""

    def __init__(self, files: tuple[RankFile, ...]) -> None:
        self._files = files
        self._found: dict[int, list[tuple[int, int, str]]] = defaultdict(list)

    def add(self, what: str, file: int, offset: int, size_bytes: int) -> None:
        if not 0 <= file < len(self._files):
            raise ValueError(f"{what}: there is no file {file}")
        if offset < 0 or offset + size_bytes > self._files[file].size_bytes:
            raise ValueError(f"{what}: bytes {offset}+{size_bytes} lie outside {self._files[file].key}")
        if size_bytes:
            self._found[file].append((offset, offset + size_bytes, what))

    def require_disjoint(self) -> None:
        for file, found in self._found.items():
            found.sort()
            for (_, stop, before), (start, _, what) in itertools.pairwise(found):
                if start < stop:
                    raise ValueError(f"{before} and {what} share bytes of {self._files[file].key}")


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"there is no dtype {dtype!r}")
    return DTYPE_BYTES[dtype]


def _check_shape(what: str, shape: tuple[int, ...]) -> None:
    # Before any product of sizes: that of many huge ones would take hours.
    if len(shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_SIZE for size in shape):
        raise ValueError(f"{what}: there is no such shape")


def _check_cover(what: str, fragments: Iterable[Fragment | FrozenFragment], numel: int) -> None:
    position = 0
    for fragment in sorted(fragments, key=lambda f: f.start):
        if fragment.start != position or fragment.length < 1:
            raise ValueError(f"{what}: elements from {position} on are missing or given twice")
        position += fragment.length
    if position != numel:
        raise ValueError(f"{what}: {position} of {numel} elements are there")


def seal(document: dict[str, Any]) -> bytes:
    """Canonical JSON of ``document``, and as its last field, ``sha256``, the digest of those very bytes."""
    data = canonical_json(document)
    return data[:-1] + _seal_of(data)


def unseal(data: bytes, *, source: str) -> dict[str, Any]:
    """The document of :func:`seal`.

    Raises:
        IntegrityError: a byte is other than it was, or these never were sealed bytes.
    """
    body = data[:-_SEAL_BYTES] + b"}"
    if data[-_SEAL_BYTES:] != _seal_of(body):
        raise IntegrityError(f"{source} is damaged: its bytes do not match the digest that they carry.")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{source} is not JSON: {e}.") from e
    if not isinstance(document, dict):
        raise IntegrityError(f"{source} is not a JSON object.")
    return document


def _seal_of(data: bytes) -> bytes:
    return b',"sha256":"' + hashlib.sha256(data).hexdigest().encode() + b'"}'


_SEAL_BYTES = len(_seal_of(b""))


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


def overlaps(fragments: Iterable[AnyFragment], start: int, length: int) -> Iterator[tuple[AnyFragment, int, int]]:
    """Stored fragments that hold elements ``start … start + length - 1``.

    Yields:
        (fragment, first element within the fragment, number of elements)
    """
    stop = start + length
    for fragment in fragments:
        low, high = max(start, fragment.start), min(stop, fragment.start + fragment.length)
        if low < high:
            yield fragment, low - fragment.start, high - low
