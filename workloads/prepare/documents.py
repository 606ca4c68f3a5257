"""What a source holds: documents of text, and records, each with its line. Read ahead by threads, in bounded memory."""

from __future__ import annotations

import codecs
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from orchestrator.dataset.source import Slice, SourceFile, read_lines, read_range, read_source
from orchestrator.spec import DataSpec
from orchestrator.store import Store
from workloads.prepare.clean import clean, is_empty
from workloads.prepare.cutting import is_parquet
from workloads.prepare.parts import PartJob, Tally
from workloads.prepare.records import Unusable, text_of

_READS = 16  # pieces of the source read ahead of the one that is tokenized
_READ_BYTES = 64 * 2**20  # unless one alone is larger
_ROWS = 1024  # of a Parquet file made Python objects at once
_COLUMN_BYTES = 2**20  # of a Parquet column read at a time
_BINARY_BYTES = 8 * 2**10  # where a NUL tells that a file is no text

Records = Iterator[tuple[int, Any]]
"""(line, record or :class:`Unusable`), lines from 1; None for an empty line."""


class NotInFormat(Exception):
    """A file, or a slice of one, that is not what the format says; the text says why."""


def texts(data: DataSpec, slices: Iterable[Slice], store: Store) -> Iterator[tuple[Slice, Tally, Iterator[str]]]:
    """Each slice's documents, with the tally that what is none is counted in, as they are read.

    Raises:
        NotInFormat: from the documents, and after some of them where that is seen late.
    """
    for piece, content in _read_ahead(data, slices, store):
        tally = Tally()
        if data.format in ("text", "source"):
            found = _whole_text(data, piece, content, tally)
        else:
            found = _record_texts(data, piece, content, store, tally)
        yield piece, tally, _cleaned(found, tally) if data.clean else found


def job_records(job: PartJob, store: Store, tally: Tally, fields: list[str]) -> Iterator[tuple[SourceFile, int, Any]]:
    """A part's records as (file, line within the part, record), in their order. What cannot be read is counted instead.

    Args:
        fields: the columns that are wanted of a Parquet file; JSON lines are read whole.
    """
    for file, records in read_records(job.data, job.slices, store, fields=fields, bad=tally.skip_file):
        for _, record in records:
            tally.lines[file.path] += 1
            if record is None:
                continue
            tally.num_records += 1
            line = tally.lines[file.path]
            if isinstance(record, Unusable):
                tally.skip(file, line, record)
            else:
                yield file, line, record


def read_records(
    data: DataSpec, slices: Iterable[Slice], store: Store, *, fields: list[str], bad: Callable[[SourceFile, str], None]
) -> Iterator[tuple[SourceFile, Records]]:
    """The records of each slice that is what the format says.

    Args:
        bad: told of a file that is not, and why. A slice of Parquet is read twice for it: it is used whole or not at
            all.
    """
    for piece, content in _read_ahead(data, slices, store):
        if content is not None:
            yield piece.file, _json_lines(content)
            continue
        try:
            for _ in _parquet_batches(piece, store, fields):
                pass
        except NotInFormat as e:
            bad(piece.file, str(e))
        else:
            yield piece.file, _parquet_rows(piece, store, fields)


def _read_ahead(data: DataSpec, slices: Iterable[Slice], store: Store) -> Iterator[tuple[Slice, bytes | None]]:
    """Each slice with its bytes, in order; without them for Parquet, which is read piece by piece."""

    def read(piece: Slice) -> bytes | None:
        if is_parquet(piece.file, data):
            return None
        return read_source(piece.file, store) if piece.of == 1 else read_lines(piece, store)

    under_way: deque[tuple[Slice, Future[bytes | None]]] = deque()
    with ThreadPoolExecutor(_READS) as pool:
        for piece in slices:
            under_way.append((piece, pool.submit(read, piece)))
            while len(under_way) > _READS or sum(one.size_bytes for one, _ in under_way) > _READ_BYTES:
                first, content = under_way.popleft()
                yield first, content.result()
        while under_way:
            first, content = under_way.popleft()
            yield first, content.result()


def _whole_text(data: DataSpec, piece: Slice, content: bytes | None, tally: Tally) -> Iterator[str]:
    """A file's text, its only document."""
    content = content or b""
    try:
        if data.format == "source" and b"\0" in content[:_BINARY_BYTES]:
            raise ValueError("it is binary")
        yield content.decode("utf-8")
    except ValueError as e:
        if data.format != "source":
            raise NotInFormat("it is not UTF-8") from e
        tally.counts["left_out_binary"] += 1


def _record_texts(data: DataSpec, piece: Slice, content: bytes | None, store: Store, tally: Tally) -> Iterator[str]:
    records = _json_lines(content) if content is not None else _parquet_rows(piece, store, [data.text_field])
    for line, record in records:
        tally.lines[piece.file.path] += 1
        if record is None:
            continue
        tally.num_records += 1
        try:
            if isinstance(record, Unusable):
                raise record
            text = text_of(record, data)
        except Unusable as e:
            tally.skip(piece.file, line, e)
        else:
            if text is None:
                tally.counts["skipped_empty"] += 1
            else:
                yield text


def _cleaned(documents: Iterable[str], tally: Tally) -> Iterator[str]:
    for document in documents:
        text = clean(document)
        if is_empty(text):
            tally.counts["skipped_empty"] += 1
        else:
            yield text


def _json_lines(content: bytes) -> Records:
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n") if content else []
    return ((number, _json_line(line)) for number, line in enumerate(lines, start=1))


def _json_line(line: bytes) -> Any:
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Unusable("not_utf8")
    except (ValueError, RecursionError) as e:
        return Unusable("not_json", _why(e))
    return Unusable("not_an_object") if record is None else record


def _parquet_rows(piece: Slice, store: Store, fields: list[str]) -> Records:
    """The rows of a slice of a Parquet file, with those of ``fields`` that it has.

    Raises:
        NotInFormat: it is not Parquet, or has none of ``fields``.
    """
    line = 0
    for batch in _parquet_batches(piece, store, fields):
        for row in batch.to_pylist():
            line += 1
            yield line, row


def _parquet_batches(piece: Slice, store: Store, fields: list[str]) -> Iterator[Any]:
    """The slice's row groups, of which the ``n``-th of ``m`` slices has its share, batch by batch."""
    import pyarrow.parquet

    try:
        source = pyarrow.PythonFile(_Ranged(piece.file, store), mode="r")
        file = pyarrow.parquet.ParquetFile(source, buffer_size=_COLUMN_BYTES)
        columns = [field for field in fields if field in file.schema_arrow.names]
        if not columns:
            raise NotInFormat(f"it has no column {' or '.join(fields)}")
        groups = file.metadata.num_row_groups
        for group in range(groups * piece.number // piece.of, groups * (piece.number + 1) // piece.of):
            yield from file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)
    except (pyarrow.ArrowException, OSError) as e:
        raise NotInFormat(f"it is not parquet: {(str(e).splitlines() or [type(e).__name__])[0]}") from e


class _Ranged(io.RawIOBase):
    """A source file that is read by ranges, as pyarrow asks for them."""

    def __init__(self, file: SourceFile, store: Store) -> None:
        self._file, self._store, self._position = file, store, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size_bytes}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size_bytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        content = read_range(self._file, self._store, self._position, wanted) if wanted else b""
        self._position += len(content)
        return content


def _why(error: Exception) -> str:
    """What is wrong with a line of JSON, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0]
