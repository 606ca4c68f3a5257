"""Where the entries of a split lie: which shard, and which of its pieces."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.format import DatasetManifest, Split
from orchestrator.errors import IntegrityError
from orchestrator.store import layout

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is fetched, checked and kept as one."""

    key: str
    """Of the shard, in the store."""
    start: int
    """First byte within the shard."""
    num_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.key} (bytes {self.start:,} to {self.start + self.num_bytes:,})"


class PieceMap:
    """The pieces of a split, numbered through. Pure.

    Raises:
        IntegrityError: the manifest names a shard outside its folder.
    """

    def __init__(self, manifest: DatasetManifest, split: Split) -> None:
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._prefix = layout.dataset(manifest.name, manifest.fingerprint)
        self._shards, self._piece_bytes = split.shards, manifest.piece_bytes
        self._entries = manifest.piece_bytes // self.dtype.itemsize
        for shard in split.shards:
            if shard.file in ("", "..") or PurePosixPath(shard.file).name != shard.file:
                raise IntegrityError(f"The manifest names a shard {shard.file!r} outside its folder.")
        self._starts = np.array([0, *accumulate(shard.num_tokens for shard in split.shards)])
        self._first = [0, *accumulate(len(shard.pieces) for shard in split.shards)]
        self._first_of_shard = np.array(self._first)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, number: int) -> Piece:
        of_shard = bisect_right(self._first, number) - 1
        shard, start = self._shards[of_shard], (number - self._first[of_shard]) * self._piece_bytes
        return Piece(
            key=self._prefix + shard.file,
            start=start,
            num_bytes=min(self._piece_bytes, shard.size_bytes - start),
            sha256=shard.pieces[number - self._first[of_shard]],
        )

    def find(self, entries: I64) -> tuple[I64, I64]:
        """For each entry of the split its piece, and its place in that."""
        shard = np.searchsorted(self._starts, entries, side="right") - 1
        piece, offset = np.divmod(entries - self._starts[shard], self._entries)
        return self._first_of_shard[shard] + piece, offset
