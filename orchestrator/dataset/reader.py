"""Reads samples of a prepared dataset. Shards are fetched once a node, checked, and mapped into memory."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.format import DatasetManifest, Shard, Split
from orchestrator.dataset.rows import Rows, unpack_labelled, unpack_packed
from orchestrator.errors import EnvironmentUnusable, IntegrityError, RunError
from orchestrator.store import layout
from orchestrator.store.s3 import Store

_FETCHES = 4  # shards fetched at once


def cache_directory() -> Path:
    """Where files from the store are kept on this node: ``HEADWAY_CACHE``, else ``~/.cache/headway``."""
    return Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway")


class TokenReader:
    """The samples of one split. Opening it fetches what is not on this node yet and checks every byte."""

    def __init__(
        self,
        store: Store,
        manifest: DatasetManifest,
        split: Split,
        *,
        sequence_length: int,
        cache: Path | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self.num_samples = manifest.num_samples(split, sequence_length)
        self._kind = manifest.kind
        folder = (cache or cache_directory()) / "datasets" / manifest.fingerprint
        prefix = layout.dataset(manifest.name, manifest.fingerprint)
        with ThreadPoolExecutor(_FETCHES) as pool:
            paths = list(
                pool.map(lambda shard: _fetch(store, prefix, shard, folder, manifest.piece_bytes), split.shards)
            )
        self._shards = [np.memmap(path, dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r") for path in paths]
        self._starts = [0, *accumulate(shard.num_tokens for shard in split.shards)]

    def rows(self, indices: npt.NDArray[np.int64]) -> Rows:
        """What the task takes of ``indices``, all in ``0 … num_samples - 1``; B of them, with L = sequence_length.

        A stream gives ``tokens`` (B, L + 1). Conversations give ``tokens``, ``is_target`` and ``positions``, each
        (B, L + 1). Labelled texts give ``tokens`` (B, L), ``label`` (B,) and ``length`` (B,).
        """
        if self._kind == "stream":
            return {"tokens": self.samples(indices)}
        entries = np.empty((len(indices), self.sequence_length + 1), dtype=np.uint32)
        for row, index in enumerate(indices):
            self._read(int(index) * entries.shape[1], entries[row])
        return unpack_packed(entries) if self._kind == "packed" else unpack_labelled(entries)

    def samples(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token ids of a stream's ``indices``; shape (len(indices), sequence_length + 1)."""
        if self._kind != "stream":
            raise ValueError(f"{self._kind} samples are read by rows()")
        out = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            self._read(int(index) * self.sequence_length, out[row])
        return out

    def _read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with the entries from ``start`` on, over the borders of shards."""
        shard = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self._starts[shard]
            part = self._shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1


def require_samples(reader: TokenReader, *, at_least: int, what: str) -> None:
    """Refuse a dataset that cannot fill one batch.

    Raises:
        RunError: fewer samples than needed.
    """
    if reader.num_samples < at_least:
        raise RunError(
            f"The {what} split holds {reader.num_samples} samples of {reader.sequence_length} tokens; "
            f"{at_least} are needed.",
            next_step="Use more data, or a smaller data.sequence_length or train.global_batch_size.",
        )


def _fetch(store: Store, prefix: str, shard: Shard, folder: Path, piece_bytes: int) -> Path:
    """A shard's path on this node's disk, its bytes checked."""
    if shard.file in ("", "..") or Path(shard.file).name != shard.file:
        raise IntegrityError(f"The manifest names a shard {shard.file!r} outside its folder.")
    path = folder / shard.file
    if path.exists() and _matches(path.read_bytes(), shard, piece_bytes):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = store.get(prefix + shard.file)
        if not _matches(data, shard, piece_bytes):
            raise IntegrityError(f"{store.uri_of(prefix + shard.file)} does not match its recorded digests.")
        path.write_bytes(data)
    except OSError as e:
        raise EnvironmentUnusable(
            f"{shard.file} ({shard.size_bytes} bytes) cannot be kept in {folder}: {e}.",
            next_step="Free space there, or set HEADWAY_CACHE to a larger disk.",
        ) from e
    return path


def _matches(data: bytes, shard: Shard, piece_bytes: int) -> bool:
    pieces = [
        hashlib.sha256(data[start : start + piece_bytes]).hexdigest() for start in range(0, len(data), piece_bytes)
    ]
    return len(data) == shard.size_bytes and pieces == list(shard.pieces)
