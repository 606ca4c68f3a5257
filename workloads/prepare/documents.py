"""What a source holds: documents of text, and records, each with its line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.dataset.source import Slice, SourceFile, read_lines, read_source
from orchestrator.spec import DataSpec
from orchestrator.store import Store
from workloads.prepare.parts import PartJob, Tally, is_parquet
from workloads.prepare.records import Unusable

logger = logging.getLogger(__name__)
_READS = 16
_ROWS = 1024  # of a Parquet file made Python objects at once
_NOT_THE_FORMAT = (ValueError, KeyError, TypeError, RecursionError)


def read_documents(
    data: DataSpec, files: Iterable[SourceFile], store: Store
) -> Iterator[tuple[SourceFile, list[str] | None]]:
    """Each file's documents, read ahead by threads; None where it is not what the format says."""
    with ThreadPoolExecutor(_READS) as pool:
        for file, content in pool.map(lambda f: (f, read_source(f, store)), files):
            try:
                yield file, list(documents_of(content, data))
            except _NOT_THE_FORMAT as e:
                logger.warning("%s is skipped: %s", file.uri, e)
                yield file, None


def documents_of(content: bytes, data: DataSpec) -> Iterator[str]:
    """A file's documents.

    Raises:
        ValueError, KeyError, TypeError: it is not in the format, or lacks the field.
    """
    if data.format == "text":
        yield content.decode("utf-8")
    elif data.format == "jsonl":
        for line in content.decode("utf-8").split("\n"):  # splitlines() would also cut at U+2028 within a text
            if line.strip():
                yield text_of(json.loads(line)[data.text_field])
    else:
        for row in _parquet_rows(content, [data.text_field]):
            if row[data.text_field] is not None:
                yield text_of(row[data.text_field])


def read_records(
    data: DataSpec, slices: Sequence[Slice], store: Store, *, fields: list[str]
) -> Iterator[tuple[SourceFile, Iterator[tuple[int, Any]] | None]]:
    """Each slice's records as (line, record or :class:`Unusable`), lines from 1; None for a file that is unreadable.

    Args:
        fields: the columns that are wanted of a Parquet file; JSON lines are read whole.
    """
    with ThreadPoolExecutor(_READS) as pool:
        for part, content in pool.map(lambda s: (s, read_lines(s, store)), slices):
            if not is_parquet(part.file, data):
                yield part.file, _json_lines(content)
                continue
            try:
                rows = list(_parquet_rows(content, fields))
            except ValueError as e:
                logger.warning("%s is skipped: %s", part.file.uri, e)
                yield part.file, None
            else:
                yield part.file, iter(enumerate(rows, start=1))


def job_records(job: PartJob, store: Store, tally: Tally, fields: list[str]) -> Iterator[tuple[SourceFile, int, Any]]:
    """A part's records as (file, line, record), in their order. What cannot be read is counted instead."""
    for file, records in read_records(job.data, job.slices, store, fields=fields):
        if records is None:
            tally.unreadable.append(file.path)
            continue
        for line, record in records:
            tally.lines[file.path] += 1
            if record is None:
                continue
            tally.num_records += 1
            if isinstance(record, Unusable):
                tally.skip(file, line, record.reason)
            else:
                yield file, line, record


def _json_lines(content: bytes) -> Iterator[tuple[int, Any]]:
    """Every line, an empty one as None."""
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            record = json.loads(line.decode("utf-8")) if line.strip() else None
            yield number, Unusable("not_an_object") if record is None and line.strip() else record
        except UnicodeDecodeError:
            yield number, Unusable("not_utf8")
        except (ValueError, RecursionError):
            yield number, Unusable("not_json")


def _parquet_rows(content: bytes, fields: list[str]) -> Iterator[dict[str, Any]]:
    """A Parquet file's rows, with those of ``fields`` that it has.

    Raises:
        ValueError: it is not Parquet, or has none of ``fields``.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        columns = [field for field in fields if field in file.schema_arrow.names]
        if not columns:
            raise ValueError(f"it has no column {' or '.join(fields)}")
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"it is not parquet: {e}") from e


def text_of(value: object) -> str:
    """A text that can be encoded.

    Raises:
        TypeError: no text. ValueError: half a surrogate pair, which JSON can say and which is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"the text field holds {type(value).__name__}, not text")
    value.encode()
    return value
