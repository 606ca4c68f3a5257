"""A base model in the store: ``bases/<fingerprint>/manifest.json``, and the files that it lists.

The base exists when its manifest does. Its files lie in a folder of their own for each time that someone set out to
copy them, ``bases/<fingerprint>/<nonce>/``; whoever creates the manifest first has made the base, and nothing that the
manifest speaks of is ever written again. Weight files have a block index as checkpoints do: docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.checkpoint.catalog import reread
from orchestrator.checkpoint.format import (
    DTYPE_BYTES,
    MAX_DIMENSIONS,
    MAX_MANIFEST_BYTES,
    MAX_SIZE,
    RankFile,
    seal,
    unseal,
)
from orchestrator.errors import IntegrityError
from orchestrator.spec import canonical_json
from orchestrator.store import Store, layout

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_NONCE = re.compile(r"[0-9a-z]+")
_FILE_NAME = re.compile(r"[\w.-]+")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseFile(_Frozen):
    """A small file, as it was found: config, tokenizer, chat template."""

    size_bytes: int
    sha256: str


class WeightFile(_Frozen):
    """A safetensors file, as it was found, and its block index. ``index_key`` is relative to the base's folder."""

    size_bytes: int
    sha256: str
    index_key: str
    index_sha256: str


class BaseTensor(_Frozen):
    """A tensor that lies whole in one weight file."""

    file: str
    dtype: str
    """In safetensors' words."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the file's start."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


class BaseManifest(_Frozen):
    format: Literal["headway/base/1"] = "headway/base/1"
    fingerprint: str
    uri: str
    """Where the files came from."""
    prefix: str
    """The key that theirs begin with, with a slash at the end."""
    block_bytes: Literal[65536] = 65536
    files: dict[str, BaseFile]
    weights: dict[str, WeightFile]
    tensors: dict[str, BaseTensor]
    created_s: float

    @model_validator(mode="after")
    def _describes_what_can_be(self) -> BaseManifest:
        folder, _, nonce = self.prefix.rstrip("/").rpartition("/")
        if f"{folder}/" != layout.base(self.fingerprint) or not _NONCE.fullmatch(nonce) or self.prefix[-1] != "/":
            raise ValueError(f"{self.prefix!r} is no folder of this base")
        for name in [*self.files, *self.weights]:
            if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
                raise ValueError(f"{name!r} is not a plain file name")
        for name, file in self.weights.items():
            RankFile(key=name, **file.model_dump(exclude={"sha256"}))  # checks keys and size
        for name, tensor in self.tensors.items():
            self._check_tensor(name, tensor)
        return self

    def _check_tensor(self, name: str, tensor: BaseTensor) -> None:
        if tensor.file not in self.weights or tensor.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {name}: there is no file {tensor.file!r}, or no dtype {tensor.dtype!r}")
        # Before any product of sizes: that of many huge ones would take hours.
        if len(tensor.shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_SIZE for size in tensor.shape):
            raise ValueError(f"tensor {name}: there is no such shape")
        if tensor.offset < 0 or tensor.offset + tensor.size_bytes > self.weights[tensor.file].size_bytes:
            raise ValueError(f"tensor {name} lies outside {tensor.file}")

    @property
    def reference(self) -> BaseReference:
        """What checkpoints and versions refer to it by."""
        return BaseReference(fingerprint=self.fingerprint, digest=self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of all contents, in hex: the same for the same files, whenever and from wherever they were copied."""
        found = {name: file.sha256 for part in (self.files, self.weights) for name, file in part.items()}
        return hashlib.sha256(canonical_json(found)).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for part in (self.files, self.weights) for file in part.values())

    def sealed(self) -> bytes:
        """The bytes of ``manifest.json``."""
        return seal(self.model_dump(mode="json"))


def read_base(store: Store, fingerprint: str) -> BaseManifest:
    """The manifest of a base model.

    Raises:
        NotFound: it was never fetched. IntegrityError: it is damaged, or another base's.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise IntegrityError(f"{fingerprint!r} is not the fingerprint of a base model: 16 hex digits.")
    key = layout.base_manifest(fingerprint)
    return reread(lambda: _parse(store.get_range(key, 0, MAX_MANIFEST_BYTES + 1), store.uri_of(key), fingerprint))


def _parse(data: bytes, uri: str, fingerprint: str) -> BaseManifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{uri} is larger than {MAX_MANIFEST_BYTES} bytes; no manifest is.")
    try:
        manifest = BaseManifest.model_validate(unseal(data, source=uri))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{uri} is not a headway/base/1 manifest: {where} {first['msg']}.") from e
    if manifest.fingerprint != fingerprint:
        raise IntegrityError(f"{uri} is the manifest of another base model: {manifest.fingerprint}.")
    return manifest
