"""Fakes at the seams, for tests that open no socket."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound
from orchestrator.spec import canonical_json
from orchestrator.store import ObjectInfo, Store
from orchestrator.store.s3 import UnfinishedUpload


def _etag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class _Bytes:
    """The objects of all buckets, shared by the stores that :meth:`Store.at` opens."""

    num_retries = 0

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.unfinished: list[tuple[str, str, UnfinishedUpload]] = []
        self.lock = threading.Lock()


class MemoryStore(Store):
    """A :class:`Store` in memory with S3's conditional semantics. Safe to use from several threads.

    What the real one builds on its primitives (``create_json``, ``create_numbered``, ``get_json``,
    ``get_verified``) is inherited, so tests run that code. ``fail`` raises an error on chosen calls::

        store.fail["create"] = StoreError("down")      # every create from now on
        del store.fail["create"]
    """

    _connection: Any

    def __init__(self, bucket: str = "memory", prefix: str = "", *, client: Any = None) -> None:
        held: Any = client or _Bytes()
        super().__init__(bucket, prefix, client=held)
        self.fail: dict[str, Exception] = {}

    @property
    def objects(self) -> dict[str, bytes]:
        """Relative key → bytes, a copy."""
        with self._connection.lock:
            return {
                key[len(self.prefix) :]: data
                for (bucket, key), (data, _) in sorted(self._connection.held.items())
                if bucket == self.bucket and key.startswith(self.prefix)
            }

    def tamper(self, key: str, data: bytes) -> None:
        """Put other bytes there behind Headway's back."""
        self._put(key, data)

    def at(self, bucket: str, prefix: str = "") -> MemoryStore:
        return MemoryStore(bucket, prefix, client=self._connection)

    def of_this_process(self) -> MemoryStore:
        return self

    def get(self, key: str) -> bytes:
        self._check("get")
        return self._read(key)

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self._check("get_range")
        return self._read(key)[start : start + num_bytes]

    def get_unchanged(self, key: str, etag: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        self._check("get_unchanged")
        data = self._read(key)
        if _etag(data) != etag:
            raise IntegrityError(f"{self.uri_of(key)} was written over.")
        return data[start:] if num_bytes is None else data[start : start + num_bytes]

    def download(self, key: str, path: Path, *, sha256: str) -> None:
        self._check("download")
        data = self._read(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(f"{self.uri_of(key)} does not match its recorded digest sha256 {sha256[:12]}….")
        path.write_bytes(data)

    def exists(self, key: str) -> bool:
        self._check("exists")
        with self._connection.lock:
            return (self.bucket, self.prefix + key) in self._connection.held

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        self._check("list")
        with self._connection.lock:
            held = sorted(self._connection.held.items(), key=lambda item: item[0][1].encode())
        for (bucket, key), (data, modified_s) in held:
            if bucket != self.bucket or not key.startswith(self.prefix + prefix):
                continue
            if start_after and key.encode() <= (self.prefix + start_after).encode():
                continue
            yield ObjectInfo(
                key=key[len(self.prefix) :],
                size_bytes=len(data),
                etag=_etag(data),
                modified_s=modified_s,
            )

    def list_folders(self, prefix: str) -> Iterator[str]:
        names = {
            item.key[len(prefix) :].split("/", 1)[0] for item in self.list(prefix) if "/" in item.key[len(prefix) :]
        }
        yield from sorted(names)

    def create(self, key: str, data: bytes) -> None:
        self._check("create")
        with self._connection.lock:
            found = self._connection.held.setdefault((self.bucket, self.prefix + key), (bytes(data), time.time()))
        if found[0] != data:
            raise AlreadyExists(f"{self.uri_of(key)} exists already.")

    def upload(
        self,
        key: str,
        source: bytes | memoryview | BinaryIO | Path,
        *,
        max_concurrency: int | None = None,
        once: bool = False,
    ) -> None:
        self._check("upload")
        if once and self.exists(key):
            return
        if isinstance(source, Path):
            self._put(key, source.read_bytes())
        else:
            self._put(key, source if isinstance(source, bytes | memoryview) else source.read())

    def upload_stream(
        self, key: str, chunks: Iterable[bytes | memoryview], *, once: bool = False, size_bytes: int = 0
    ) -> None:
        self._check("upload_stream")
        if once and self.exists(key):
            return
        self._put(key, b"".join(chunks))

    def leave_unfinished(self, key: str, *, started_s: float) -> UnfinishedUpload:
        """Put a multipart upload there whose writer died."""
        upload = UnfinishedUpload(key=key, upload_id=secrets.token_hex(8), started_s=started_s)
        with self._connection.lock:
            self._connection.unfinished.append((self.bucket, self.prefix + key, upload))
        return upload

    def unfinished_uploads(self, prefix: str) -> Iterator[UnfinishedUpload]:
        self._check("unfinished_uploads")
        with self._connection.lock:
            found = sorted(self._connection.unfinished, key=lambda item: item[1].encode())
        for bucket, key, upload in found:
            if bucket == self.bucket and key.startswith(self.prefix + prefix):
                yield replace(upload, key=key[len(self.prefix) :])

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        self._check("abort_upload")
        with self._connection.lock:
            self._connection.unfinished[:] = [
                item for item in self._connection.unfinished if item[2].upload_id != upload.upload_id
            ]

    def put_status(self, key: str, value: Any) -> None:
        self._check("put_status")
        self._put(key, canonical_json(value))

    def delete(self, keys: Iterable[str]) -> None:
        self._check("delete")
        with self._connection.lock:
            for key in keys:
                self._connection.held.pop((self.bucket, self.prefix + key), None)

    def _check(self, call: str) -> None:
        if call in self.fail:
            raise self.fail[call]

    def _read(self, key: str) -> bytes:
        with self._connection.lock:
            found = self._connection.held.get((self.bucket, self.prefix + key))
        if found is None:
            raise NotFound(f"{self.uri_of(key)}: no such object.")
        data: bytes = found[0]
        return data

    def _put(self, key: str, data: bytes | memoryview) -> None:
        with self._connection.lock:
            self._connection.held[(self.bucket, self.prefix + key)] = (bytes(data), time.time())
