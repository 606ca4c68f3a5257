"""What a source holds: documents of text, and records, each with its line."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.dataset.source import Slice, SourceFile, read_lines, read_source
from orchestrator.spec import DataSpec
from orchestrator.store import Store
from workloads.prepare.parts import PartJob, Tally, is_parquet
from workloads.prepare.records import Unusable

_READS = 16
_ROWS = 1024  # of a Parquet file made Python objects at once
_NOT_THE_FORMAT = (ValueError, KeyError, TypeError, RecursionError)

BadFile = Callable[[SourceFile, str], None]
"""Told of a file that is not what the format says, and why it is not."""


def _ignore(file: SourceFile, why: str) -> None:
    """Where a file is told of elsewhere."""


def read_documents(
    data: DataSpec, files: Iterable[SourceFile], store: Store, *, bad: BadFile = _ignore
) -> Iterator[tuple[SourceFile, list[str]]]:
    """The documents of each file that is what the format says, read ahead by threads."""
    with ThreadPoolExecutor(_READS) as pool:
        for file, content in pool.map(lambda f: (f, read_source(f, store)), files):
            try:
                documents = list(documents_of(content, data))
            except _NOT_THE_FORMAT as e:
                bad(file, _why(e))
            else:
                yield file, documents


def documents_of(content: bytes, data: DataSpec) -> Iterator[str]:
    """A file's documents.

    Raises:
        ValueError, KeyError, TypeError: it is not in the format, or lacks the field.
    """
    if data.format == "text":
        yield content.decode("utf-8")
    elif data.format == "jsonl":
        lines = content.decode("utf-8").split("\n")  # splitlines() would also cut at U+2028 within a text
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield text_of(json.loads(line)[data.text_field])
            except _NOT_THE_FORMAT as e:
                raise ValueError(f"line {number}: {_why(e)}") from e
    else:
        for row in _parquet_rows(content, [data.text_field]):
            if row[data.text_field] is not None:
                yield text_of(row[data.text_field])


def read_records(
    data: DataSpec, slices: Sequence[Slice], store: Store, *, fields: list[str], bad: BadFile = _ignore
) -> Iterator[tuple[SourceFile, Iterator[tuple[int, Any]]]]:
    """Each readable slice's records as (line, record or :class:`Unusable`), lines from 1; None for an empty line.

    Args:
        fields: the columns that are wanted of a Parquet file; JSON lines are read whole.
    """
    with ThreadPoolExecutor(_READS) as pool:
        for part, content in pool.map(lambda s: (s, read_lines(s, store)), slices):
            if not is_parquet(part.file, data):
                yield part.file, _json_lines(content)
                continue
            try:
                _check_parquet(content, fields)
            except ValueError as e:
                bad(part.file, _why(e))
            else:
                yield part.file, iter(enumerate(_parquet_rows(content, fields), start=1))


def job_records(job: PartJob, store: Store, tally: Tally, fields: list[str]) -> Iterator[tuple[SourceFile, int, Any]]:
    """A part's records as (file, line, record), in their order. What cannot be read is counted instead."""
    for file, records in read_records(job.data, job.slices, store, fields=fields, bad=tally.skip_file):
        for line, record in records:
            tally.lines[file.path] += 1
            if record is None:
                continue
            tally.num_records += 1
            if isinstance(record, Unusable):
                tally.skip(file, line, record)
            else:
                yield file, line, record


def _json_lines(content: bytes) -> Iterator[tuple[int, Any]]:
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
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


def _check_parquet(content: bytes, fields: list[str]) -> None:
    """Read all of it once, without making objects of it: a file is used whole or not at all.

    Raises:
        ValueError: as :func:`_parquet_rows`.
    """
    for _ in _parquet_batches(content, fields):
        pass


def _parquet_rows(content: bytes, fields: list[str]) -> Iterator[dict[str, Any]]:
    """A Parquet file's rows, with those of ``fields`` that it has.

    Raises:
        ValueError: it is not Parquet, or has none of ``fields``.
    """
    for batch in _parquet_batches(content, fields):
        yield from batch.to_pylist()


def _parquet_batches(content: bytes, fields: list[str]) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        columns = [field for field in fields if field in file.schema_arrow.names]
        if not columns:
            raise ValueError(f"it has no column {' or '.join(fields)}")
        yield from file.iter_batches(_ROWS, columns=columns)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"it is not parquet: {e}") from e


def _why(error: Exception) -> str:
    """What is wrong with a file or a line, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a surrogate pair, which is no text"
    if isinstance(error, KeyError):
        return f"it has no field {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0]


def text_of(value: object) -> str:
    """A text that can be encoded.

    Raises:
        TypeError: no text. ValueError: half a surrogate pair, which JSON can say and which is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"the text field holds {type(value).__name__}, not text")
    value.encode()
    return value
