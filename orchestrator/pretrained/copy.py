"""One file of a base model into the store: streamed, with its digest and block index, in memory that does not grow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.checkpoint.format import BLOCK_BYTES, block_index
from orchestrator.dataset.source import SourceFile
from orchestrator.errors import EnvironmentUnusable, IntegrityError, NotFound, RunError
from orchestrator.pretrained.format import BaseFile, WeightFile
from orchestrator.pretrained.header import StoredTensor, read_header
from orchestrator.store.s3 import Store, split_uri

_CHUNK_BYTES = 128 * BLOCK_BYTES
_MAX_SMALL_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class CopiedWeights:
    name: str
    file: WeightFile
    tensors: dict[str, StoredTensor]


class Original(Protocol):
    """A file where it was found."""

    def read(self, start: int, num_bytes: int) -> bytes:
        """Fewer bytes come back only at the file's end."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """All of it, in whole blocks but for the last; each only valid until the next."""

    def is_as_listed(self, sha256: str) -> bool:
        """Whether what was read, of this digest, is what the listing spoke of."""


class _Local:
    """A file on this machine; its listing has its SHA-256."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._path = file, Path(file.uri)

    def read(self, start: int, num_bytes: int) -> bytes:
        with self._path.open("rb") as opened:
            opened.seek(start)
            return opened.read(num_bytes)

    def chunks(self) -> Iterator[bytes | memoryview]:
        room = memoryview(bytearray(_CHUNK_BYTES))
        with self._path.open("rb") as opened:  # buffered, so that a short read is the end
            while taken := opened.readinto(room):
                yield room[:taken]

    def is_as_listed(self, sha256: str) -> bool:
        return sha256 == self._file.etag


class _InS3:
    """An object; its listing has its ETag, which changes when the object does."""

    def __init__(self, file: SourceFile, store: Store) -> None:
        bucket, self._key = split_uri(file.uri)
        self._file, self._place = file, store.at(bucket)

    def read(self, start: int, num_bytes: int) -> bytes:
        return self._place.get_range(self._key, start, num_bytes)

    def chunks(self) -> Iterator[bytes | memoryview]:
        for start in range(0, self._file.size_bytes, _CHUNK_BYTES):
            yield self.read(start, min(_CHUNK_BYTES, self._file.size_bytes - start))

    def is_as_listed(self, sha256: str) -> bool:
        return any(item.key == self._key and item.etag == self._file.etag for item in self._place.list(self._key))


def original(file: SourceFile, store: Store) -> Original:
    return _InS3(file, store) if file.uri.startswith("s3://") else _Local(file)


def copy_weights(file: SourceFile, store: Store, prefix: str) -> CopiedWeights:
    """Copy one safetensors file to ``prefix`` in the store, and its block index beside it.

    Raises:
        RunError: it is no sound safetensors file. IntegrityError: it is not what was listed.
        EnvironmentUnusable: it cannot be read.
    """
    tally = _Tally()
    with _changes_named(file):
        source = original(file, store)
        tensors = read_header(source.read, file.size_bytes, source=file.uri)
        chunks = tally.through(_as_listed(source, file, tally))
        store.upload_stream(prefix + file.path, chunks, once=True, size_bytes=file.size_bytes)
    index = bytes(tally.index)
    index_key = f"{file.path}.index"
    store.upload(prefix + index_key, index, once=True)
    stored = WeightFile(
        size_bytes=tally.size_bytes,
        sha256=tally.sha256,
        index_key=index_key,
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    return CopiedWeights(name=file.path, file=stored, tensors=tensors)


def read_small(file: SourceFile, store: Store) -> bytes:
    """A small file's content.

    Raises:
        RunError: it is not small. IntegrityError: it is not what was listed.
    """
    if file.size_bytes > _MAX_SMALL_BYTES:
        raise RunError(
            f"model.pretrained: {file.uri} has {file.size_bytes} bytes; of a config or tokenizer file the limit is "
            f"{_MAX_SMALL_BYTES}.",
            next_step="Is it what its name says? If it is not needed, take it out of the folder.",
        )
    tally = _Tally()
    with _changes_named(file):
        source = original(file, store)
        return b"".join(bytes(chunk) for chunk in tally.through(_as_listed(source, file, tally)))


def copy_small(name: str, data: bytes, store: Store, prefix: str) -> BaseFile:
    store.upload(prefix + name, data, once=True)
    return BaseFile(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def copy_to_disk(file: SourceFile, store: Store, path: Path) -> None:
    """Copy one file to ``path``.

    Raises:
        IntegrityError: it is not what was listed.
    """
    tally = _Tally()
    with _changes_named(file), path.open("wb") as out:
        for chunk in tally.through(_as_listed(original(file, store), file, tally)):
            out.write(chunk)


class _Tally:
    """Size, digest and block index of what passes through."""

    def __init__(self) -> None:
        self.size_bytes, self.index, self._digest = 0, bytearray(), hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def through(self, chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            self._digest.update(chunk)
            self.index += block_index(chunk)
            self.size_bytes += len(chunk)
            yield chunk


def _as_listed(source: Original, file: SourceFile, tally: _Tally) -> Iterator[bytes | memoryview]:
    """The file's chunks. Ends with an error, before whoever takes them thinks it has all, where it was changed."""
    yield from source.chunks()
    if tally.size_bytes != file.size_bytes or not source.is_as_listed(tally.sha256):
        raise _changed(file)


class _changes_named:  # noqa: N801  used as a statement
    """Names the file in what goes wrong while it is read. One that is gone has changed, too."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        gone = isinstance(error, FileNotFoundError) and error.filename == self._file.uri
        if gone or (isinstance(error, NotFound) and self._file.uri in error.message):
            raise _changed(self._file) from error
        if isinstance(error, OSError):
            raise EnvironmentUnusable(f"model.pretrained: {self._file.uri} cannot be copied: {error}.") from error


def _changed(file: SourceFile) -> IntegrityError:
    return IntegrityError(
        f"model.pretrained: {file.uri} is not what it was when it was listed.",
        next_step="Let nothing write there, and submit it again; changed weights make another run.",
    )
