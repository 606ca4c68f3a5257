"""Uploads of what is not a file: bytes that lie in memory, and bytes that arrive piece by piece."""

from __future__ import annotations

import contextlib
import io
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.store.client import PART_BYTES

MAX_PARTS = 10_000
"""What S3 takes of one object (Amazon S3 User Guide, "Multipart upload limits")."""
STREAM_CONCURRENCY = 2
"""Parts of a stream under way at once; one more is being gathered."""


@dataclass(frozen=True, kw_only=True)
class UnfinishedUpload:
    """A multipart upload that was neither completed nor aborted: its parts take space, and no listing shows them."""

    key: str
    upload_id: str
    started_s: float
    """By the server's clock, seconds since the epoch."""


class ViewFile(io.RawIOBase):
    """A contiguous buffer as a readable, seekable file. ``read(n)`` copies ``n`` bytes and no more."""

    def __init__(self, view: memoryview) -> None:
        self._view = view.cast("B")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._at + size
        piece = bytes(self._view[self._at : end])
        self._at += len(piece)
        return piece


def upload_stream(
    api: Any,
    where: dict[str, str],
    chunks: Iterable[bytes | memoryview],
    *,
    metadata: dict[str, str],
    condition: dict[str, str],
    part_bytes: int = PART_BYTES,
) -> None:
    """Write ``chunks`` one after the other to ``where`` (Bucket, Key), by parts where they fill more than one.

    ``condition`` (IfNoneMatch) goes with the request that makes the object appear.
    What goes wrong, in ``chunks`` or in S3, is raised as it is, and the parts are taken back.
    """
    parts = _gathered(chunks, part_bytes)
    first = next(parts, bytearray())
    if len(first) < part_bytes:
        api.put_object(**where, Body=first, Metadata=metadata, **condition)
        return
    upload = {**where, "UploadId": api.create_multipart_upload(**where, Metadata=metadata)["UploadId"]}
    try:
        with ThreadPoolExecutor(STREAM_CONCURRENCY) as pool:
            parts = _followed(first, parts)
            del first  # else it stays in memory to the end
            sent = _send(api, upload, parts, pool)
        api.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent}, **condition)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell; collection finds what is left
            api.abort_multipart_upload(**upload)
        raise


def noted(chunks: Iterable[bytes | memoryview], errors: list[Exception]) -> Iterator[bytes | memoryview]:
    """The same chunks; an error that they raise is noted too, which tells it from those of their upload."""
    try:
        yield from chunks
    except Exception as e:
        errors.append(e)
        raise


def part_size(size_bytes: int) -> int:
    """Bytes in each part of an object of ``size_bytes``: whole MiB, so many that MAX_PARTS hold it. Pure."""
    needed = math.ceil(size_bytes / MAX_PARTS)
    return max(PART_BYTES, math.ceil(needed / 2**20) * 2**20)


def _gathered(chunks: Iterable[bytes | memoryview], part_bytes: int) -> Iterator[bytearray]:
    """The same bytes in parts of ``part_bytes``; the last may be shorter."""
    part, used = bytearray(part_bytes), 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            taken = min(len(rest), part_bytes - used)
            part[used : used + taken] = rest[:taken]
            rest, used = rest[taken:], used + taken
            if used == part_bytes:
                yield part
                part, used = bytearray(part_bytes), 0
    if used:
        del part[used:]
        yield part


def _followed(first: bytearray, rest: Iterator[bytearray]) -> Iterator[bytearray]:
    yield first
    del first
    yield from rest


def _send(
    api: Any, upload: dict[str, str], parts: Iterator[bytearray], pool: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    """Send the parts, at most ``STREAM_CONCURRENCY`` at a time; what CompleteMultipartUpload wants to know of them."""
    under_way: deque[Future[dict[str, Any]]] = deque()
    sent = []

    def send(number: int, part: bytearray) -> dict[str, Any]:
        return {"PartNumber": number, "ETag": api.upload_part(**upload, PartNumber=number, Body=part)["ETag"]}

    for number, part in enumerate(parts, 1):
        if len(under_way) == STREAM_CONCURRENCY:
            sent.append(under_way.popleft().result())
        under_way.append(pool.submit(send, number, part))
    return [*sent, *(future.result() for future in under_way)]
