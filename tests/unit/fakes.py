"""Fakes at the seams, for tests that open no socket."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound
from orchestrator.spec import canonical_json
from orchestrator.store import ObjectInfo, Store


class _Bytes:
    """The objects of all buckets, shared by the stores that :meth:`Store.at` opens."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.lock = threading.Lock()


class MemoryStore(Store):
    """A :class:`Store` in memory with S3's conditional semantics. Safe to use from several threads.

    What the real one builds on its primitives (``create_json``, ``create_numbered``, ``get_json``,
    ``get_verified``) is inherited, so tests run that code. ``fail`` raises an error on chosen calls::

        store.fail["create"] = StoreError("down")      # every create from now on
        del store.fail["create"]
    """

    def __init__(self, bucket: str = "memory", prefix: str = "", *, client: Any = None) -> None:
        super().__init__(bucket, prefix, client=client or _Bytes())
        self.fail: dict[str, Exception] = {}

    @property
    def objects(self) -> dict[str, bytes]:
        """Relative key → bytes, a copy."""
        with self._client.lock:
            return {
                key[len(self.prefix) :]: data
                for (bucket, key), (data, _) in sorted(self._client.held.items())
                if bucket == self.bucket and key.startswith(self.prefix)
            }

    def tamper(self, key: str, data: bytes) -> None:
        """Put other bytes there behind Headway's back."""
        self._put(key, data)

    def at(self, bucket: str, prefix: str = "") -> MemoryStore:
        return MemoryStore(bucket, prefix, client=self._client)

    def get(self, key: str) -> bytes:
        self._check("get")
        return self._read(key)

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self._check("get_range")
        return self._read(key)[start : start + num_bytes]

    def download(self, key: str, path: Path, *, sha256: str) -> None:
        self._check("download")
        data = self._read(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(f"{self.uri_of(key)} does not match its recorded digest sha256 {sha256[:12]}….")
        path.write_bytes(data)

    def exists(self, key: str) -> bool:
        self._check("exists")
        with self._client.lock:
            return (self.bucket, self.prefix + key) in self._client.held

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        self._check("list")
        with self._client.lock:
            held = sorted(self._client.held.items(), key=lambda item: item[0][1].encode())
        for (bucket, key), (data, modified_s) in held:
            if bucket != self.bucket or not key.startswith(self.prefix + prefix):
                continue
            if start_after and key.encode() <= (self.prefix + start_after).encode():
                continue
            yield ObjectInfo(
                key=key[len(self.prefix) :],
                size_bytes=len(data),
                etag=hashlib.md5(data, usedforsecurity=False).hexdigest(),
                modified_s=modified_s,
            )

    def list_folders(self, prefix: str) -> Iterator[str]:
        names = {
            item.key[len(prefix) :].split("/", 1)[0] for item in self.list(prefix) if "/" in item.key[len(prefix) :]
        }
        yield from sorted(names)

    def create(self, key: str, data: bytes) -> None:
        self._check("create")
        with self._client.lock:
            found = self._client.held.setdefault((self.bucket, self.prefix + key), (bytes(data), time.time()))
        if found[0] != data:
            raise AlreadyExists(f"{self.uri_of(key)} exists already.")

    def upload(self, key: str, source: bytes | BinaryIO | Path) -> None:
        self._check("upload")
        if isinstance(source, Path):
            self._put(key, source.read_bytes())
        else:
            self._put(key, source if isinstance(source, bytes) else source.read())

    def put_status(self, key: str, value: Any) -> None:
        self._check("put_status")
        self._put(key, canonical_json(value))

    def delete(self, keys: Iterable[str]) -> None:
        self._check("delete")
        with self._client.lock:
            for key in keys:
                self._client.held.pop((self.bucket, self.prefix + key), None)

    def _check(self, call: str) -> None:
        if call in self.fail:
            raise self.fail[call]

    def _read(self, key: str) -> bytes:
        with self._client.lock:
            found = self._client.held.get((self.bucket, self.prefix + key))
        if found is None:
            raise NotFound(f"{self.uri_of(key)}: no such object.")
        data: bytes = found[0]
        return data

    def _put(self, key: str, data: bytes) -> None:
        with self._client.lock:
            self._client.held[(self.bucket, self.prefix + key)] = (bytes(data), time.time())
