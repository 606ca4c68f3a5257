"""Verified ranged reads of one committed checkpoint. Needs no torch: bytes go where the caller points.

Blocks of 64 KiB are checked against the file's index before a byte of them is used. A block that does not match is
fetched again, since the wire may have damaged it; one that stays wrong is damage in the store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.checkpoint.catalog import Folder, reread
from orchestrator.checkpoint.format import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    DTYPE_BYTES,
    Buffer,
    Manifest,
    RankFile,
    covering_blocks,
    num_blocks,
    overlaps,
    verify_blocks,
)
from orchestrator.errors import IntegrityError
from orchestrator.store import Store

READ_BYTES = 16 * 2**20
"""The most that one request asks for."""
_GAP_BYTES = 64 * 1024
"""Pieces no further apart than this are fetched by one request."""
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A byte range of one file and the memory that it fills: a writable view of single bytes."""

    file: int
    start: int
    target: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.target)


class CheckpointReader:
    """Reads one checkpoint. Safe to use from several threads.

    Args:
        num_readers: requests at once, of up to 16 MiB each; what bounds the memory that a read takes.
    """

    def __init__(self, store: Store, folder: Folder, manifest: Manifest, *, num_readers: int = _READERS) -> None:
        self.manifest, self.folder = manifest, folder
        self.bytes_read = 0
        self._counting = threading.Lock()
        self._store, self._num_readers = store, num_readers
        self._indexes: dict[int, bytes] = {}

    def uri_of(self, file: RankFile) -> str:
        return self._store.uri_of(self.folder.prefix + file.key)

    def check_indexes(self) -> None:
        """Fetch every file's index and check it and the file's size.

        Raises:
            IntegrityError: naming the first bad part. NotFound: an index is missing.
        """
        sizes = {item.key: item.size_bytes for item in self._store.list(self.folder.prefix)}
        for number, file in enumerate(self.manifest.files):
            self._index(number)
            found = sizes.get(self.folder.prefix + file.key)
            if found != file.size_bytes:
                raise IntegrityError(f"{self.uri_of(file)} holds {found} bytes, not {file.size_bytes}.")

    def read(self, pieces: Iterable[Piece]) -> None:
        """Fill every piece's target, by parallel requests.

        Raises:
            IntegrityError: a block does not match its digest. NotFound: a file is missing.
        """
        groups = list(_coalesce(pieces))
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
        size_bytes = self.manifest.files[number].size_bytes
        spans = ((start, min(size_bytes, start + READ_BYTES)) for start in range(0, size_bytes, READ_BYTES))
        self._index(number)
        with ThreadPoolExecutor(self._num_readers) as pool:
            for _ in pool.map(lambda span: self._verified(number, *span), spans):
                pass

    def _read_group(self, group: list[Piece]) -> None:
        number, start, stop = group[0].file, group[0].start, max(piece.stop for piece in group)
        blocks = covering_blocks(start, stop - start, self.manifest.files[number].size_bytes)
        data = memoryview(self._verified(number, blocks.start, blocks.stop))
        for piece in group:
            offset = piece.start - blocks.start
            piece.target[:] = data[offset : offset + len(piece.target)]

    def _verified(self, number: int, start: int, stop: int) -> bytes:
        """Whole blocks from byte ``start`` on, checked."""
        file = self.manifest.files[number]

        def read() -> bytes:
            data = self._store.get_range(self.folder.prefix + file.key, start, stop - start)
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
            file: RankFile = self.manifest.files[number]
            self._indexes[number] = reread(
                lambda: self._store.get_verified(
                    self.folder.prefix + file.index_key,
                    sha256=file.index_sha256,
                    size_bytes=num_blocks(file.size_bytes) * DIGEST_BYTES,
                )
            )
        return self._indexes[number]


def pieces_of(manifest: Manifest, name: str, kind: str, start: int, target: memoryview) -> Iterator[Piece]:
    """The byte ranges that fill ``target`` with a parameter's elements from ``start`` on.

    Args:
        kind: ``fp32``, ``exp_avg`` or ``exp_avg_sq``, as 4-byte floats.
    """
    for stored, skip, length in overlaps(manifest.parameters[name].fragments, start, len(target) // 4):
        into = 4 * (stored.start + skip - start)
        yield Piece(
            file=stored.file,
            start=stored.offsets[kind] + 4 * skip,  # type: ignore[index]
            target=target[into : into + 4 * length],
        )


def frozen_pieces(manifest: Manifest, name: str, start: int, target: memoryview) -> Iterator[Piece]:
    """The same for a parameter that is not trained, in its own dtype."""
    parameter = manifest.frozen[name]
    size = DTYPE_BYTES[parameter.dtype]
    for stored, skip, length in overlaps(parameter.fragments, start, len(target) // size):
        into = size * (stored.start + skip - start)
        yield Piece(file=stored.file, start=stored.offset + size * skip, target=target[into : into + size * length])


def buffer_piece(buffer: Buffer, target: memoryview) -> Piece:
    return Piece(file=buffer.file, start=buffer.offset, target=target)


def _coalesce(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one file that lie close together, as requests of at most READ_BYTES."""
    split = [
        Piece(file=piece.file, start=piece.start + offset, target=piece.target[offset : offset + READ_BYTES])
        for piece in pieces
        for offset in range(0, len(piece.target), READ_BYTES)
    ]
    group: list[Piece] = []
    for piece in sorted(split, key=lambda p: (p.file, p.start)):
        if group and (
            piece.file != group[0].file
            or piece.stop - group[0].start > READ_BYTES
            or piece.start > group[-1].stop + _GAP_BYTES
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
