"""Reads samples of a prepared dataset, piece by piece as they are needed, and ahead of their use."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.cache import Bytes, PieceCache
from orchestrator.dataset.fetch import Fetcher
from orchestrator.dataset.format import DatasetManifest, Split
from orchestrator.dataset.pieces import PieceMap
from orchestrator.dataset.rows import Rows, unpack_labelled, unpack_packed
from orchestrator.errors import RunError
from orchestrator.store.s3 import Store

MAPPED_BYTES = 8 * 2**30
MEMORY_BYTES = 2**30
_READ_ON = 4  # pieces fetched behind one that is read in sequence

I64 = npt.NDArray[np.int64]
Allocate = Callable[[tuple[int, ...]], I64]
"""Makes the array that token ids are read into; pinned memory, say."""


def _allocate(shape: tuple[int, ...]) -> I64:
    return np.empty(shape, dtype=np.int64)


class TokenReader:
    """The samples of one split. Opening it reads nothing yet.

    For one thread at a time. After a fork the child gets threads and connections of its own.

    Args:
        cache: the node's folder of pieces; None is the one that all of the node share.
        mapped_bytes: of pieces that stay mapped into memory. They are pages of the node's file cache, which the kernel
            takes back where memory is short; a piece that had to go is mapped again, and not fetched. Where the disk
            takes nothing more, pieces are memory of this process instead, at most :data:`MEMORY_BYTES` of them.
    """

    def __init__(
        self,
        store: Store,
        manifest: DatasetManifest,
        split: Split,
        *,
        sequence_length: int,
        cache: Path | None = None,
        mapped_bytes: int = MAPPED_BYTES,
    ) -> None:
        self.sequence_length = sequence_length
        self.num_samples = manifest.num_samples(split, sequence_length)
        self._kind = manifest.kind
        self._stride = sequence_length if self._kind == "stream" else sequence_length + 1
        self._pieces = PieceMap(manifest, split)
        self._store, self._cache = store, PieceCache(cache)
        self._max_mapped, self._max_in_memory = (
            max(2, most // manifest.piece_bytes) for most in (mapped_bytes, min(mapped_bytes, MEMORY_BYTES))
        )
        self._held: OrderedDict[int, Future[Bytes] | npt.NDArray[Any]] = OrderedDict()
        self._fetcher: Fetcher | None = None
        self._process = os.getpid()

    def rows(self, indices: I64, *, allocate: Allocate = _allocate) -> Rows:
        """What the task takes of ``indices``, all in ``0 … num_samples - 1``; B of them, with L = sequence_length.

        A stream gives ``tokens`` (B, L + 1). Conversations give ``tokens``, ``is_target`` and ``positions``, each
        (B, L + 1). Labelled texts give ``tokens`` (B, L), ``label`` (B,) and ``length`` (B,).

        Raises:
            IntegrityError: bytes that are not the manifest's. StoreError: they cannot be had.
        """
        if self._kind == "stream":
            return {"tokens": self.samples(indices, allocate=allocate)}
        entries = np.empty((len(indices), self.sequence_length + 1), dtype=np.uint32)
        self._read(indices, entries)
        return unpack_packed(entries) if self._kind == "packed" else unpack_labelled(entries)

    def samples(self, indices: I64, *, allocate: Allocate = _allocate) -> I64:
        """Token ids of a stream's ``indices``; shape (len(indices), sequence_length + 1)."""
        if self._kind != "stream":
            raise ValueError(f"{self._kind} samples are read by rows()")
        out = allocate((len(indices), self.sequence_length + 1))
        self._read(indices, out)
        return out

    def prefetch(self, indices: I64, *, at_most: int) -> list[int]:
        """Begin to get what the batches ``indices``, shape (S, B), need and is not being got already.

        It stops at the end of a batch, once that is ``at_most`` bytes or more. Returns how many bytes it is of each
        batch up to there, beyond those of the batches before it.
        """
        starts = indices * self._stride
        pieces = np.concatenate([self._pieces.find(starts)[0], self._pieces.find(starts + self.sequence_length)[0]], 1)
        wanted, first = np.unique(pieces, return_index=True)
        in_order = np.argsort(first)
        num_bytes = [0] * len(indices)
        total = current = 0
        for piece, batch in zip(wanted[in_order].tolist(), (first[in_order] // pieces.shape[1]).tolist(), strict=True):
            if batch > current and total >= at_most:
                return num_bytes[:batch]
            current = batch
            num_bytes[batch] += (more := self._request(piece))
            total += more
        return num_bytes

    def counts(self) -> dict[str, int]:
        """What was read so far, by :meth:`orchestrator.dataset.fetch.Fetcher.counts`."""
        return self._fetcher.counts() if self._fetcher is not None and self._process == os.getpid() else {}

    def close(self) -> None:
        if self._fetcher is not None and self._process == os.getpid():
            self._fetcher.close()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A reader stays in its process: send the dataset's name, and open it there")

    def _read(self, indices: I64, out: npt.NDArray[Any]) -> None:
        """Fill the rows of ``out`` with the entries of the samples, over the borders of pieces and shards."""
        starts = indices * self._stride
        pieces, offsets = (found.tolist() for found in self._pieces.find(starts))
        needed = set(pieces)
        if any(piece not in self._held for piece in needed):
            self._ensure(indices, max(needed))
        entries = {piece: self._entries(piece) for piece in needed}
        length = out.shape[1]
        for row, (piece, offset) in enumerate(zip(pieces, offsets, strict=True)):
            here = entries[piece][offset : offset + length]
            if len(here) == length:
                out[row] = here
                continue
            filled = 0
            while True:
                out[row, filled : filled + len(here)] = here
                filled += len(here)
                if filled == length:
                    break
                piece += 1
                here = self._entries(piece)[: length - filled]

    def _ensure(self, indices: I64, last_piece: int) -> None:
        """Have all of them on their way before the first is waited for."""
        self.prefetch(indices[None], at_most=0)
        if len(indices) > 1 and int(indices[-1] - indices[0]) == len(indices) - 1:  # in sequence: read on
            for piece in range(last_piece + 1, min(last_piece + 1 + _READ_ON, len(self._pieces))):
                self._request(piece)

    def _request(self, number: int) -> int:
        """Have a piece on its way. Returns the bytes that are to come; 0 where it was asked for before."""
        fetcher = self._live()
        if number in self._held:
            return 0
        piece = self._pieces[number]
        self._held[number] = fetcher.submit(piece)
        most = self._max_in_memory if fetcher.holds_memory else self._max_mapped
        while len(self._held) > most:
            self._held.popitem(last=False)
        return piece.num_bytes

    def _entries(self, piece: int) -> npt.NDArray[Any]:
        found = self._held.get(piece)
        if found is None:
            self._request(piece)
            found = self._held[piece]
        if isinstance(found, Future):
            try:
                found = found.result().view(self._pieces.dtype)
            except BaseException:
                self._held.pop(piece, None)  # so that a caller who tries again asks again
                raise
            self._held[piece] = found
        self._held.move_to_end(piece)
        return found

    def _live(self) -> Fetcher:
        """This process's threads and connections."""
        if self._fetcher is None or self._process != os.getpid():
            self._forget()
            self._fetcher = Fetcher(self._store.of_this_process(), self._cache)
        return self._fetcher

    def _forget(self) -> None:
        self._held, self._fetcher, self._process = OrderedDict(), None, os.getpid()


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
