"""Verified ranged reads of one committed checkpoint. Needs no torch: bytes go where the caller points."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.checkpoint.blocks import READ_BYTES, BlockReader, Piece
from orchestrator.checkpoint.catalog import Folder
from orchestrator.checkpoint.format import DTYPE_BYTES, Buffer, Manifest, overlaps
from orchestrator.store import Store

__all__ = ["READ_BYTES", "CheckpointReader", "Piece", "buffer_piece", "frozen_pieces", "pieces_of"]

_READERS = 8


class CheckpointReader(BlockReader):
    """Reads one checkpoint. Safe to use from several threads.

    Args:
        num_readers: requests at once, of up to 16 MiB each; what bounds the memory that a read takes.
    """

    def __init__(self, store: Store, folder: Folder, manifest: Manifest, *, num_readers: int = _READERS) -> None:
        super().__init__(store, folder.prefix, manifest.files, num_readers=num_readers)
        self.manifest, self.folder = manifest, folder


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
