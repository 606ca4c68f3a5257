"""Verified ranged reads of files that have a block index: a checkpoint's, or a base model's. Needs no torch.

Blocks of 64 KiB are checked against the file's index before a byte of them is used. A block that does not match is
fetched again, since the wire may have damaged it; one that stays wrong is damage in the store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from orchestrator.checkpoint.catalog import reread
from orchestrator.checkpoint.format import BLOCK_BYTES, DIGEST_BYTES, covering_blocks, num_blocks, verify_blocks
from orchestrator.errors import IntegrityError
from orchestrator.store import Store

READ_BYTES = 16 * 2**20
"""The most that one request asks for, unless the reader is told otherwise."""
_GAP_BYTES = 64 * 1024
"""Pieces no further apart than this are fetched by one request."""


class BlockFile(Protocol):
    """A file and its index. Keys are relative to the reader's prefix."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def index_key(self) -> str: ...
    @property
    def index_sha256(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A byte range of one file and the memory that it fills: a writable view of single bytes."""

    file: int
    start: int
    target: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.target)

    def parts(self, num_bytes: int) -> Iterator[Piece]:
        """The same range in runs of at most ``num_bytes``, a multiple of 8."""
        for offset in range(0, len(self.target), num_bytes):
            yield Piece(file=self.file, start=self.start + offset, target=self.target[offset : offset + num_bytes])

    def fill(self, data: memoryview) -> None:
        """Take the bytes ``start … stop - 1`` of the file, which were checked."""
        self.target[:] = data


class BlockReader:
    """Reads files under one prefix of the store. Safe to use from several threads.

    Args:
        files: what :attr:`Piece.file` counts.
        num_readers: requests at once, of up to ``read_bytes`` each; what bounds the memory that a read takes.
    """

    def __init__(
        self, store: Store, prefix: str, files: Sequence[BlockFile], *, num_readers: int, read_bytes: int = READ_BYTES
    ) -> None:
        self.bytes_read = 0
        self._store, self._prefix, self._files = store, prefix, files
        self._num_readers, self._read_bytes = num_readers, read_bytes
        self._counting = threading.Lock()
        self._indexes: dict[int, bytes] = {}

    def uri_of(self, file: BlockFile) -> str:
        return self._store.uri_of(self._prefix + file.key)

    def check_indexes(self) -> None:
        """Fetch every file's index and check it and the file's size.

        Raises:
            IntegrityError: naming the first bad part. NotFound: an index is missing.
        """
        sizes = {item.key: item.size_bytes for item in self._store.list(self._prefix)}
        for number, file in enumerate(self._files):
            self._index(number)
            found = sizes.get(self._prefix + file.key)
            if found != file.size_bytes:
                raise IntegrityError(f"{self.uri_of(file)} holds {found} bytes, not {file.size_bytes}.")

    def read(self, pieces: Iterable[Piece]) -> None:
        """Fill every piece's target, by parallel requests.

        Raises:
            IntegrityError: a block does not match its digest. NotFound: a file is missing.
        """
        groups = list(coalesce(pieces, self._read_bytes))
        for number in {group[0].file for group in groups}:
            self._index(number)
        if len(groups) == 1:
            self._read_group(groups[0])
            return
        with ThreadPoolExecutor(min(self._num_readers, len(groups) or 1)) as pool:
            for _ in pool.map(self._read_group, groups):
                pass

    def check_file(self, number: int) -> None:
        """Read every byte of one file and check it.

        Raises:
            IntegrityError, NotFound: naming the first bad part.
        """
        size_bytes = self._files[number].size_bytes
        step = self._read_bytes
        spans = ((start, min(size_bytes, start + step)) for start in range(0, size_bytes, step))
        self._index(number)
        with ThreadPoolExecutor(self._num_readers) as pool:
            for _ in pool.map(lambda span: self._verified(number, *span), spans):
                pass

    def _read_group(self, group: list[Piece]) -> None:
        number, start, stop = group[0].file, group[0].start, max(piece.stop for piece in group)
        blocks = covering_blocks(start, stop - start, self._files[number].size_bytes)
        data = memoryview(self._verified(number, blocks.start, blocks.stop))
        for piece in group:
            piece.fill(data[piece.start - blocks.start : piece.stop - blocks.start])

    def _verified(self, number: int, start: int, stop: int) -> bytes:
        """Whole blocks from byte ``start`` on, checked."""
        file = self._files[number]

        def read() -> bytes:
            data = self._store.get_range(self._prefix + file.key, start, stop - start)
            with self._counting:
                self.bytes_read += len(data)
            if len(data) != stop - start:
                raise IntegrityError(f"{self.uri_of(file)} ends at byte {start + len(data)}.")
            verify_blocks(data, start // BLOCK_BYTES, self._index(number), source=self.uri_of(file))
            return data

        return reread(read)

    def _index(self, number: int) -> bytes:
        """One file's index, fetched and checked at its first use."""
        if number not in self._indexes:
            file = self._files[number]
            self._indexes[number] = reread(
                lambda: self._store.get_verified(
                    self._prefix + file.index_key,
                    sha256=file.index_sha256,
                    size_bytes=num_blocks(file.size_bytes) * DIGEST_BYTES,
                )
            )
        return self._indexes[number]


def coalesce(pieces: Iterable[Piece], read_bytes: int = READ_BYTES) -> Iterator[list[Piece]]:
    """Pieces of one file that lie close together, as requests of at most ``read_bytes``. Pure."""
    split = [part for piece in pieces for part in piece.parts(read_bytes)]
    group: list[Piece] = []
    for piece in sorted(split, key=lambda p: (p.file, p.start)):
        if group and (
            piece.file != group[0].file
            or piece.stop - group[0].start > read_bytes
            or piece.start > group[-1].stop + _GAP_BYTES
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
