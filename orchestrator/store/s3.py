"""The store: an S3 prefix. Credentials, region and endpoint follow boto3's own chain and variables.

Semantics used: PutObject with ``If-None-Match: *`` answers 412 where the key exists and 409 where another
conditional write of it is under way (Amazon S3 User Guide, "Conditional requests").
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound, StoreError, UsageError
from orchestrator.spec import canonical_json
from orchestrator.store.client import (
    PART_BYTES,
    PATIENT,
    PROMPT,
    UNATTENDED,
    UPLOAD_CONCURRENCY,
    Connection,
    PastTheEnd,
    Patience,
    WriteUnderWay,
    new_client,
    transfer_config,
    translated,
)
from orchestrator.store.multipart import UnfinishedUpload, ViewFile, noted, part_size, upload_stream

__all__ = [
    "PART_BYTES",
    "PATIENT",
    "PROMPT",
    "STORE_VARIABLE",
    "UNATTENDED",
    "ObjectInfo",
    "Patience",
    "Store",
    "UnfinishedUpload",
    "new_client",
    "open_store",
    "split_uri",
]

STORE_VARIABLE = "HEADWAY_STORE"
CONFLICT_TRIES = 6
_UPLOAD_MARK = "headway-upload"
_ONCE = "once"


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object of a listing. ``key`` is relative to the listing's store."""

    key: str
    size_bytes: int
    etag: str
    modified_s: float


class Store:
    """An S3 prefix. Keys given and returned are relative to it. Safe to use from several threads."""

    def __init__(self, bucket: str, prefix: str = "", *, client: Connection | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._connection = client or new_client(PATIENT)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    @property
    def retries(self) -> int:
        """How often a request, or the body of an answer, was asked for again, by all stores that share the client."""
        return self._connection.num_retries

    def at(self, bucket: str, prefix: str = "") -> Store:
        """Another place reached with the same client: a source of data, say."""
        return Store(bucket, prefix, client=self._connection)

    def of_this_process(self) -> Store:
        """The same place, with connections of its own where this process was forked from the one that opened it."""
        if self._connection.process == os.getpid():
            return self
        return Store(self.bucket, self.prefix, client=self._connection.renewed())

    @property
    def _client(self) -> Any:
        return self._connection.api

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _translated(self, key: str) -> translated:
        return translated(self.uri_of(key), self._connection.endpoint_url)

    # -- reading

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            NotFound: no such object. StoreError: anything else.
        """
        return self._get(key, {})

    def get_json(self, key: str) -> Any:
        """A JSON object, parsed.

        Raises:
            NotFound: no such object. IntegrityError: not JSON.
        """
        data = self.get(key)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise IntegrityError(f"{self.uri_of(key)} is not JSON: {e}.") from e

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``start``; fewer come back only at the object's end, none beyond it."""
        return self._get(key, _span(start, num_bytes)) if num_bytes else b""

    def get_unchanged(self, key: str, etag: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        """As :meth:`get` or :meth:`get_range`; an IntegrityError where the object's ETag is another by now."""
        if num_bytes == 0:
            return b""
        span = {} if num_bytes is None else _span(start, num_bytes)
        try:
            return self._get(key, {**span, "IfMatch": f'"{etag}"'})
        except AlreadyExists as e:  # what 412 means to a writer
            raise IntegrityError(f"{self.uri_of(key)} was written over: its ETag is not {etag} any more.") from e

    def _get(self, key: str, request: dict[str, str]) -> bytes:
        try:
            with self._translated(key):
                return self._connection.read(**self._place(key), **request)
        except PastTheEnd:
            return b""

    def get_verified(self, key: str, *, sha256: str, size_bytes: int) -> bytes:
        """The whole object, checked against its digest.

        Raises:
            IntegrityError: other bytes than those that were recorded.
        """
        data = self.get(key)
        if len(data) != size_bytes or hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(
                f"{self.uri_of(key)} holds {len(data)} bytes that do not match its recorded digest "
                f"({size_bytes} bytes, sha256 {sha256[:12]}…)."
            )
        return data

    def download(self, key: str, path: Path, *, sha256: str) -> None:
        """Fetch to ``path`` in parallel ranges. The file appears there only if its digest matches."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with self._translated(key):
                self._client.download_file(self.bucket, self.prefix + key, str(partial), Config=transfer_config())
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise IntegrityError(f"{self.uri_of(key)} does not match its recorded digest sha256 {sha256[:12]}….")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        try:
            with self._translated(key):
                self._client.head_object(**self._place(key))
        except NotFound:
            return False
        return True

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order (UTF-8)."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket,
            Prefix=self.prefix + prefix,
            **({"StartAfter": self.prefix + start_after} if start_after else {}),
        )
        with self._translated(prefix):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=item["Key"][len(self.prefix) :],
                        size_bytes=item["Size"],
                        etag=item["ETag"].strip('"'),
                        modified_s=item["LastModified"].timestamp(),
                    )

    def list_folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under ``prefix``, in order."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix, Delimiter="/"
        )
        with self._translated(prefix):
            for page in pages:
                for item in page.get("CommonPrefixes", ()):
                    yield item["Prefix"][len(self.prefix) + len(prefix) :].rstrip("/")

    def unfinished_uploads(self, prefix: str) -> Iterator[UnfinishedUpload]:
        """Multipart uploads under way, or left behind, of keys that start with ``prefix``."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix
        )
        with self._translated(prefix):
            for page in pages:
                for item in page.get("Uploads", ()):
                    yield UnfinishedUpload(
                        key=item["Key"][len(self.prefix) :],
                        upload_id=item["UploadId"],
                        started_s=item["Initiated"].timestamp(),
                    )

    # -- writing

    def create(self, key: str, data: bytes) -> None:
        """Create the object; this and nothing else commits anything.

        A 412 is read back: my own bytes there mean that an earlier try of this very call won, so callers
        who race for a name put a nonce into ``data``.

        Raises:
            AlreadyExists: another writer's object has, or had, this key.
            StoreError: it may have been created; the same call again finds out.
        """
        for tried in range(CONFLICT_TRIES):
            try:
                with self._translated(key):
                    self._client.put_object(**self._place(key), Body=data, IfNoneMatch="*")
                return
            except AlreadyExists:
                if self._holds(key, data):
                    return
                raise
            except WriteUnderWay:
                time.sleep(random.uniform(0, 0.05 * 2**tried))
        raise StoreError(f"{self.uri_of(key)}: other writes of it were under way in {CONFLICT_TRIES} tries.")

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key) == data
        except NotFound:
            return False

    def create_json(self, key: str, value: Any) -> None:
        """:meth:`create` with canonical JSON."""
        self.create(key, canonical_json(value))

    def create_numbered(self, last: int, key_of: Any, value: dict[str, Any]) -> int:
        """Claim the first free number after ``last`` with ``value``, which carries a nonce."""
        claimed = last + 1
        while True:
            try:
                self.create_json(key_of(claimed), {**value, "number": claimed})
                return claimed
            except AlreadyExists:
                claimed += 1

    def upload(
        self,
        key: str,
        source: bytes | memoryview | BinaryIO | Path,
        *,
        max_concurrency: int | None = None,
        once: bool = False,
    ) -> None:
        """Write a data object under a key that only this writer owns; by parallel parts where it is large.

        With ``once``, bytes and streams are never written over an object that an earlier such upload left there: it
        is this writer's own, and stays. So a request that comes late, after its retry, changes nothing.

        ``max_concurrency`` parts at a time (8 unless told), of which that many and one more are copied in memory.
        A memoryview is contiguous, and stays unchanged until this returns.
        """
        if once and isinstance(source, bytes) and len(source) > PART_BYTES:  # boto3's transfers take no condition
            self.upload_stream(key, [source], once=True, size_bytes=len(source))
            return
        config = transfer_config(max_concurrency or UPLOAD_CONCURRENCY)
        with self._finished(key, once=once) as metadata:
            if isinstance(source, bytes) and len(source) <= PART_BYTES:
                self._client.put_object(**self._place(key), Body=source, Metadata=metadata, **_condition(once))
                return
            how: dict[str, Any] = {**self._place(key), "Config": config, "ExtraArgs": {"Metadata": metadata}}
            if isinstance(source, Path):
                self._client.upload_file(str(source), **how)
            else:
                file = ViewFile(memoryview(source)) if isinstance(source, bytes | memoryview) else source
                self._client.upload_fileobj(file, **how)

    def upload_stream(
        self, key: str, chunks: Iterable[bytes | memoryview], *, once: bool = False, size_bytes: int = 0
    ) -> None:
        """Write a data object whose bytes arrive piece by piece.

        S3 takes 10,000 parts: 156 GiB of ``PART_BYTES`` each, and any object it can hold where ``size_bytes`` says
        how many bytes will come. At most three parts are in memory. An error raised by ``chunks`` is passed on as it
        is, and the key stays as it was. ``once`` is as for :meth:`upload`.
        """
        theirs: list[Exception] = []
        with self._finished(key, once=once, but_for=theirs) as metadata:
            upload_stream(
                self._client,
                self._place(key),
                noted(chunks, theirs),
                metadata=metadata,
                condition=_condition(once),
                part_bytes=part_size(size_bytes),
            )

    @contextlib.contextmanager
    def _finished(self, key: str, *, once: bool, but_for: Sequence[Exception] = ()) -> Iterator[dict[str, str]]:
        """Around an upload that sends these metadata.

        A server that lost its answer to CompleteMultipartUpload may know no such upload when it is asked again. The
        upload has succeeded where the object carries its mark. So has one that may be done ``once``, where S3 says
        that the object exists: its mark tells that this is true. Errors that are ``but_for`` those of S3 are passed on.
        """
        mark = _ONCE if once else secrets.token_hex(16)
        try:
            with self._translated(key):
                yield {_UPLOAD_MARK: mark}
        except (NotFound, AlreadyExists) as e:
            if e in but_for or (isinstance(e, AlreadyExists) and not once) or self._mark_of(key) != mark:
                raise

    def _mark_of(self, key: str) -> str | None:
        with contextlib.suppress(StoreError), self._translated(key):
            metadata: dict[str, str] = self._client.head_object(**self._place(key))["Metadata"]
            return metadata.get(_UPLOAD_MARK)
        return None

    def put_status(self, key: str, value: Any) -> None:
        """Overwrite a status object. Only for keys that have one writer."""
        with self._translated(key):
            self._client.put_object(**self._place(key), Body=canonical_json(value))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already do not matter."""
        batch = list(keys)
        for start in range(0, len(batch), 1000):
            part = [{"Key": self.prefix + key} for key in batch[start : start + 1000]]
            with self._translated(batch[start]):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": part, "Quiet": True})
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise StoreError(f"s3://{self.bucket}/{first['Key']}: not deleted: {first.get('Message')}.")

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Take back the parts of an upload; one that is gone already does not matter."""
        with contextlib.suppress(NotFound), self._translated(upload.key):
            self._client.abort_multipart_upload(**self._place(upload.key), UploadId=upload.upload_id)


def _span(start: int, num_bytes: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{start + num_bytes - 1}"}


def _condition(once: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if once else {}


def open_store(uri: str | None = None, *, patience: Patience = PATIENT) -> Store:
    """The store at ``uri``, else at ``HEADWAY_STORE``.

    Raises:
        UsageError: no store was named, or it is not an ``s3://`` address.
    """
    chosen = uri or os.environ.get(STORE_VARIABLE, "")
    if not chosen:
        raise UsageError(
            "No store is set.",
            next_step=f"Set {STORE_VARIABLE}=s3://bucket/prefix, give --store, or start the embedded one: headway up",
        )
    return Store(*split_uri(chosen), client=new_client(patience))


def split_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/some/prefix`` as ``("bucket", "some/prefix")``."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"{uri!r} is not an S3 address.", next_step="Write it as s3://bucket/prefix")
    return parts.netloc, uri.removeprefix(f"s3://{parts.netloc}").strip("/")
