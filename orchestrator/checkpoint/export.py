"""Export: a checkpoint's master weights as Hugging Face safetensors, streamed from the fragments.

One parameter slice at a time goes through memory, whatever the model's size: each output file is laid out from
shapes alone, written to a temporary file while it is hashed, and uploaded.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from orchestrator.checkpoint.format import DTYPE_BYTES, Manifest
from orchestrator.checkpoint.resume import READ_BYTES, CheckpointReader, Piece, pieces_of
from orchestrator.checkpoint.tensors import safetensors_dtype
from orchestrator.errors import EnvironmentUnusable
from orchestrator.store import Store

_SLICE_ELEMENTS = READ_BYTES // 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    is_buffer: bool


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One output file: its tensors one after the other, as its header will say."""

    name: str
    tensors: tuple[TensorLayout, ...]

    @property
    def header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for t in self.tensors:
            span = [t.start, t.start + t.size_bytes]
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": span}
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded


def plan_files(manifest: Manifest, *, dtype: str, max_shard_bytes: int) -> list[FileLayout]:
    """Which tensors go into which file: wide elements first, so that each is aligned to its own. Pure."""
    weights = safetensors_dtype(_DTYPES[dtype])
    entries = [
        (name, weights, p.shape, p.numel * DTYPE_BYTES[weights], False) for name, p in manifest.parameters.items()
    ] + [(name, b.dtype, b.shape, b.size_bytes, True) for name, b in manifest.buffers.items()]
    entries.sort(key=lambda entry: -DTYPE_BYTES[entry[1]])
    shards: list[list[TensorLayout]] = [[]]
    position = 0
    for name, stored, shape, size, is_buffer in entries:
        if shards[-1] and position + size > max_shard_bytes:
            shards.append([])
            position = 0
        shards[-1].append(
            TensorLayout(
                name=name,
                dtype=stored,
                shape=tuple(shape),
                start=position,
                size_bytes=size,
                is_buffer=is_buffer,
            )
        )
        position += size
    if len(shards) == 1:
        return [FileLayout(name="model.safetensors", tensors=tuple(shards[0]))]
    return [
        FileLayout(name=f"model-{number:05d}-of-{len(shards):05d}.safetensors", tensors=tuple(shard))
        for number, shard in enumerate(shards, 1)
    ]


def weight_index(files: list[FileLayout]) -> bytes | None:
    """``model.safetensors.index.json``, which transformers reads where there are several files."""
    if len(files) == 1:
        return None
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.size_bytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def export_file(reader: CheckpointReader, file: FileLayout, store: Store, prefix: str, *, dtype: str) -> ExportedFile:
    """Write one output file to ``prefix`` in the store.

    Raises:
        EnvironmentUnusable: the local disk is full. IntegrityError: damaged bytes in the checkpoint.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="headway-export-", suffix=".safetensors") as scratch:
            exported = write_file(reader, file, scratch, dtype=dtype)  # type: ignore[arg-type]
            scratch.flush()
            store.upload(prefix + file.name, Path(scratch.name))
    except OSError as e:
        raise EnvironmentUnusable(
            f"{file.name} cannot be written to {tempfile.gettempdir()}: {e}.",
            next_step="Free space there, or set TMPDIR to a larger disk.",
        ) from e
    return exported


def write_file(reader: CheckpointReader, file: FileLayout, out: BinaryIO, *, dtype: str) -> ExportedFile:
    """Stream one output file to ``out``, hashing on the way."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(reader, file, dtype=dtype):
        out.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return ExportedFile(name=file.name, size_bytes=size, sha256=digest.hexdigest())


def _chunks(reader: CheckpointReader, file: FileLayout, *, dtype: str) -> Iterator[bytes]:
    yield file.header
    for tensor in file.tensors:
        if tensor.is_buffer:
            stored = reader.manifest.buffers[tensor.name]
            data = torch.empty(stored.size_bytes, dtype=torch.uint8)
            reader.read([Piece(file=stored.file, start=stored.offset, target=data)])
            yield data.numpy().tobytes()
            continue
        numel = reader.manifest.parameters[tensor.name].numel
        for start in range(0, numel, _SLICE_ELEMENTS):
            part = torch.empty(min(_SLICE_ELEMENTS, numel - start), dtype=torch.float32)
            reader.read(list(pieces_of(reader.manifest, tensor.name, "fp32", start, part)))
            yield part.to(_DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
