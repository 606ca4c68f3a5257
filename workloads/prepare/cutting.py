"""How a source is cut into parts, each the work of one task. The cut follows from the source alone.

The pieces are whole files, and slices of large ones. A part ends behind a piece by a hash of that piece's name and not
by a count from the start (content-defined chunking: Muthitacharoen et al. 2001, "A Low-bandwidth Network File
System"). So a file that is added or removed changes the part that it falls into, and hardly another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from orchestrator.dataset.source import Slice, SourceFile
from orchestrator.spec import DataSpec

MIN_PART_BYTES, MAX_PART_BYTES = 2**20, 128 * 2**20
_PARTS = 16  # at least about so many, where the source is large enough
_MIN_LINES_BYTES, _MAX_LINES_BYTES, _LINES_SLICES = 2**20, 16 * 2**20, 256
_ROWS_BYTES = 64 * 2**20  # of a Parquet file, whose row groups are seldom smaller


def slices_of(files: Iterable[SourceFile], data: DataSpec) -> list[Slice]:
    """The pieces that parts are made of. How a file is sliced depends on its own size alone."""
    return [
        Slice(file=file, number=number, of=of)
        for file in files
        for of in (_num_slices(file, data),)
        for number in range(of)
    ]


def _num_slices(file: SourceFile, data: DataSpec) -> int:
    if data.format in ("text", "source"):
        return 1
    if is_parquet(file, data):
        return max(1, file.size_bytes // _ROWS_BYTES)
    size = min(_MAX_LINES_BYTES, max(_MIN_LINES_BYTES, _power_of_two(file.size_bytes // _LINES_SLICES)))
    return max(1, file.size_bytes // size)


def is_parquet(file: SourceFile, data: DataSpec) -> bool:
    return data.format == "parquet" or (data.format == "messages" and file.path.endswith(".parquet"))


def part_bytes(source_bytes: int, *, max_bytes: int = MAX_PART_BYTES) -> int:
    """The usual size of a part: a power of two, so that a source that grows a little keeps its parts."""
    return min(max_bytes, max(MIN_PART_BYTES, _power_of_two(source_bytes // _PARTS)))


def _power_of_two(value: int) -> int:
    """The highest one that is not above ``value``; 0 below 1."""
    return 1 << (value.bit_length() - 1) if value > 0 else 0


def cut(slices: Iterable[Slice], usual_bytes: int) -> Iterator[list[Slice]]:
    """The slices in order, in parts of a quarter of ``usual_bytes`` to twice that, but for the last and for what is
    larger alone."""
    part: list[Slice] = []
    size = 0
    for piece in slices:
        part.append(piece)
        size += piece.size_bytes
        if size >= 2 * usual_bytes or (size >= usual_bytes // 4 and _ends_a_part(piece, usual_bytes)):
            yield part
            part, size = [], 0
    if part:
        yield part


def _ends_a_part(piece: Slice, usual_bytes: int) -> bool:
    """Likelier the larger the piece, so that beyond the least size a part takes three quarters of the usual on."""
    name = f"{piece.file.path}\n{piece.number}".encode("utf-8", "surrogatepass")
    chance = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
    return chance * 3 * usual_bytes < piece.size_bytes * 4 * 2**64
