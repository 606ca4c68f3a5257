"""Export: a checkpoint's weights as Hugging Face safetensors, streamed from the fragments. Needs no torch.

Each output file is laid out from shapes alone. Then its bytes are produced in order, one window of some megabytes
after the other: read by range from the rank files, checked, converted, handed on. A few windows are read ahead, so
that reading and writing overlap; nothing else is held, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.checkpoint.adapter import ADAPTER_FILE, is_replaced, plain_name, saved_name
from orchestrator.checkpoint.convert import FLOATS
from orchestrator.checkpoint.format import DTYPE_BYTES, FrozenParameter, Manifest
from orchestrator.checkpoint.sources import Slice, TensorLayout, Weights
from orchestrator.errors import EnvironmentUnusable, RunError
from orchestrator.store import Store

INDEX_NAME = "model.safetensors.index.json"
Form = Literal["merged", "adapter"]
WINDOW_BYTES = 32 * 2**20
"""Stored bytes that one window reads. With 8 MiB a server reads much of its own chunks twice: 2.7 s of its CPU time
for 400 MB, against 1.2 s."""
_READ_AHEAD = 1
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    name: str
    size_bytes: int
    sha256: str


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

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


def plan_files(manifest: Manifest, *, dtype: str, max_shard_bytes: int, form: Form = "merged") -> list[FileLayout]:
    """Which tensors go into which file: wide elements first, so that each is aligned to its own. Pure.

    Args:
        dtype: fp32, bf16 or fp16, for all floating-point weights. Buffers stay as they are.
        max_shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
        form: the whole model, with what LoRA trained merged into it, or peft's one file with that alone.

    Raises:
        RunError: there is no adapter, or it alone would not give the model back.
    """
    if form == "adapter":
        return [_adapter_file(manifest, FLOATS[dtype])]
    shards: list[list[TensorLayout]] = [[]]
    position = 0
    for tensor in sorted(_tensors(manifest, FLOATS[dtype]), key=lambda t: -DTYPE_BYTES[t.dtype]):
        if shards[-1] and position + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            position = 0
        shards[-1].append(_at(tensor, position))
        position += tensor.size_bytes
    if len(shards) == 1:
        return [FileLayout(name="model.safetensors", tensors=tuple(shards[0]))]
    return [
        FileLayout(name=f"model-{number:05d}-of-{len(shards):05d}.safetensors", tensors=tuple(shard))
        for number, shard in enumerate(shards, 1)
    ]


def _adapter_file(manifest: Manifest, dtype: str) -> FileLayout:
    own = [name for name, frozen in manifest.frozen.items() if frozen.base is None and not is_replaced(name)]
    if own or not any(frozen.lora for frozen in manifest.frozen.values()):
        reason = f"{own[0]} is neither trained nor in the pretrained model" if own else "it holds none"
        raise RunError(
            f"The checkpoint of step {manifest.state.step} gives no adapter: {reason}.",
            next_step="Export the merged model: export.lora: merged, or --lora merged.",
        )
    tensors: list[TensorLayout] = []
    position = 0
    for name in manifest.parameters:
        tensors.append(_at(_trained(manifest, name, saved_name(name), dtype), position))
        position += tensors[-1].size_bytes
    return FileLayout(name=ADAPTER_FILE, tensors=tuple(tensors))


def _tensors(manifest: Manifest, dtype: str) -> Iterator[TensorLayout]:
    """The model's tensors under its own names, with what LoRA trained merged into the weights beside it."""
    pairs = [frozen.lora for frozen in manifest.frozen.values() if frozen.lora is not None]
    merged = {name for pair in pairs for name in (pair.a, pair.b)}
    for name in manifest.parameters:
        if name not in merged:
            yield _trained(manifest, name, plain_name(name), dtype)
    for name, frozen in manifest.frozen.items():
        if not is_replaced(name):
            yield _frozen(name, frozen, dtype)
    for name, b in manifest.buffers.items():
        numel = b.size_bytes // DTYPE_BYTES[b.dtype]
        yield TensorLayout(
            name=plain_name(name), source=name, kind="buffer", stored=b.dtype, dtype=b.dtype, shape=b.shape, numel=numel
        )


def _trained(manifest: Manifest, source: str, name: str, dtype: str) -> TensorLayout:
    p = manifest.parameters[source]
    return TensorLayout(
        name=name, source=source, kind="parameter", stored="F32", dtype=dtype, shape=p.shape, numel=p.numel
    )


def _frozen(source: str, frozen: FrozenParameter, dtype: str) -> TensorLayout:
    written = dtype if frozen.dtype in FLOATS.values() else frozen.dtype
    stored = frozen.dtype
    if frozen.base is not None:  # in whatever dtype there: what is read of it is converted as it comes
        stored = "F32" if frozen.lora is not None else written
    return TensorLayout(
        name=plain_name(source), source=source, kind="frozen", stored=stored, dtype=written, shape=frozen.shape,
        numel=frozen.numel,
    )  # fmt: skip


def _at(tensor: TensorLayout, start: int) -> TensorLayout:
    return TensorLayout(**{**tensor.__dict__, "start": start})


def weight_index(files: list[FileLayout]) -> bytes | None:
    """The content of INDEX_NAME, which transformers reads where there are several files; None where there is one."""
    if len(files) == 1:
        return None
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.size_bytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def export_to_store(weights: Weights, file: FileLayout, store: Store, prefix: str) -> ExportedFile:
    """Stream one output file to ``prefix`` in the store. Neither memory nor disk holds it.

    Raises:
        IntegrityError: damaged bytes in the checkpoint. RunError: a value that the dtype cannot hold.
    """
    tally = _Tally(file.name)
    store.upload_stream(prefix + file.name, tally.through(stream(weights, file)), size_bytes=file.size_bytes)
    return tally.result()


def export_to_directory(weights: Weights, file: FileLayout, directory: Path) -> ExportedFile:
    """Stream one output file into a directory; it appears there once it is whole.

    Raises:
        EnvironmentUnusable: the disk is full, or the directory cannot be written to.
        IntegrityError, RunError: as :func:`export_to_store`.
    """
    tally = _Tally(file.name)
    partial = directory / f".{file.name}.partial"
    try:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(partial.unlink, missing_ok=True)
            with partial.open("wb") as out:
                for chunk in tally.through(stream(weights, file)):
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(directory / file.name)
    except OSError as e:
        raise EnvironmentUnusable(
            f"{file.name} cannot be written to {directory}: {e}.", next_step="Free space there, or name another place."
        ) from e
    return tally.result()


class _Tally:
    """Size and digest of what passes through."""

    def __init__(self, name: str) -> None:
        self._name, self._size_bytes, self._digest = name, 0, hashlib.sha256()

    def through(self, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            self._digest.update(chunk)
            self._size_bytes += len(chunk)
            yield chunk

    def result(self) -> ExportedFile:
        return ExportedFile(name=self._name, size_bytes=self._size_bytes, sha256=self._digest.hexdigest())


def stream(weights: Weights, file: FileLayout) -> Iterator[memoryview]:
    """One output file's bytes, in order, read some windows ahead."""
    _give_large_buffers_back()
    yield memoryview(file.header)
    waiting: deque[Future[list[memoryview]]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="export") as pool:
        try:
            for window in windows(file):
                waiting.append(pool.submit(weights.read, window))
                if len(waiting) > _READ_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _give_large_buffers_back() -> None:
    """Have every large buffer mapped by itself, so that freeing it gives its memory back. glibc only; of the process.

    Else glibc learns from the first ones to keep such memory, thread by thread: an export of 200 M parameters held
    280 MB instead of 185, and more the longer it ran.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def windows(file: FileLayout) -> Iterator[list[Slice]]:
    """The file's elements in order, as runs of at most WINDOW_BYTES of stored bytes: many small tensors, or a part of
    a large one. Pure."""
    window: list[Slice] = []
    room = WINDOW_BYTES
    for tensor in file.tensors:
        size, start = DTYPE_BYTES[tensor.stored], 0
        while start < tensor.numel:
            if room < size:
                yield window
                window, room = [], WINDOW_BYTES
            length = min(tensor.numel - start, room // size)
            window.append(Slice(tensor=tensor, start=start, length=length))
            start += length
            room -= length * size
    if window:
        yield window
