"""Which pretrained model a run file names: its files, listed without copying them, and a fingerprint of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.dataset.source import SourceFile
from orchestrator.errors import EnvironmentUnusable, SpecError
from orchestrator.pretrained.selection import is_tokenizer_file, select
from orchestrator.spec import canonical_json
from orchestrator.store.s3 import ObjectInfo, Store, split_uri

_VERSION = 1  # raise it when the same source would be stored as other tensors
_FINGERPRINT_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """A pretrained model, before it is copied into the store."""

    uri: str
    """``s3://…``, an absolute path, or ``hf://org/name@<commit>``."""
    fingerprint: str
    """16 hex digits of all that the base is made of; of the address alone, for the hub, since a commit is fixed."""
    tokenizer_fingerprint: str
    """The same of the tokenizer's files."""
    files: tuple[SourceFile, ...]
    """The files needed; none for the hub, which is asked when they are copied."""
    trust_remote_code: bool = False
    """Whether Python files count as needed."""

    @property
    def is_hub(self) -> bool:
        return self.uri.startswith("hf://")

    @property
    def is_gguf(self) -> bool:
        return is_gguf(self.uri)


def list_base(uri: str, store: Store, *, trust_remote_code: bool = False) -> BaseSource:
    """Find out what lies at ``model.pretrained``.

    Files on this machine are read for their digest, once per process; S3 is listed; the hub is not asked.

    Raises:
        SpecError: there is no such model, or one that cannot be used. StoreError: S3 cannot be reached.
    """
    if uri.startswith("hf://"):
        fingerprint = _digest({"uri": uri, "code": trust_remote_code})
        return BaseSource(
            uri=uri,
            fingerprint=fingerprint,
            tokenizer_fingerprint=fingerprint,
            files=(),
            trust_remote_code=trust_remote_code,
        )
    if uri.startswith("s3://"):
        files = _list_s3(uri, store, trust_remote_code)
    else:
        uri = str(Path(uri).expanduser().absolute())
        files = _list_local(Path(uri), trust_remote_code)
    fingerprint = _digest({"files": _facts(files)})
    tokenizer = [file for file in files if is_tokenizer_file(file.path)]
    return BaseSource(
        uri=uri,
        fingerprint=fingerprint,
        tokenizer_fingerprint=fingerprint if is_gguf(uri) else _digest({"files": _facts(tokenizer)}),
        files=tuple(files),
        trust_remote_code=trust_remote_code,
    )


def is_gguf(uri: str) -> bool:
    return uri.lower().endswith(".gguf")


def split_hub_uri(uri: str) -> tuple[str, str]:
    """``hf://org/name@<commit>`` as ``("org/name", "<commit>")``."""
    repository, _, commit = uri.removeprefix("hf://").partition("@")
    return repository, commit


def _list_s3(uri: str, store: Store, trust_remote_code: bool) -> list[SourceFile]:
    bucket, key = split_uri(uri)
    place = store.at(bucket)
    if is_gguf(uri):
        found = [item for item in place.list(key) if item.key == key]
        if not found:
            raise _nothing(uri)
        return [_s3_file(bucket, found[0], found[0].key.rsplit("/", 1)[-1])]
    folder = f"{key}/" if key else ""
    items = {item.key[len(folder) :]: item for item in place.list(folder) if "/" not in item.key[len(folder) :]}
    if not items:
        raise _nothing(uri)
    chosen = select(
        items, lambda name: place.get(folder + name), source=uri.rstrip("/"), trust_remote_code=trust_remote_code
    )
    return [_s3_file(bucket, items[name], name) for name in sorted([*chosen.files, *chosen.weights])]


def _s3_file(bucket: str, item: ObjectInfo, name: str) -> SourceFile:
    return SourceFile(uri=f"s3://{bucket}/{item.key}", path=name, etag=item.etag, size_bytes=item.size_bytes)


def _list_local(path: Path, trust_remote_code: bool) -> list[SourceFile]:
    try:
        if not path.exists():
            raise _nothing(str(path))
        if path.is_file():
            if is_gguf(str(path)):
                return [_local_file(path)]
            raise SpecError(
                f"model.pretrained: {path} is a file, and no *.gguf.",
                next_step="Name the folder that holds config.json and model.safetensors.",
            )
        names = [item.name for item in path.iterdir() if item.is_file()]
        chosen = select(
            names, lambda name: (path / name).read_bytes(), source=str(path), trust_remote_code=trust_remote_code
        )
        return [_local_file(path / name) for name in sorted([*chosen.files, *chosen.weights])]
    except OSError as e:
        raise EnvironmentUnusable(f"model.pretrained: {e.filename or path} cannot be read: {e.strerror or e}.") from e


def _local_file(path: Path) -> SourceFile:
    facts = path.stat()
    digest = _file_digest(str(path), facts.st_size, facts.st_mtime_ns)
    return SourceFile(uri=str(path), path=path.name, etag=digest, size_bytes=facts.st_size)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size_bytes: int, modified_ns: int) -> str:
    """SHA-256 of a file, in hex. Size and time are the cache's, so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(files: Sequence[SourceFile]) -> list[tuple[str, str, int]]:
    """What counts of each file. Not where it lies: a copy of a model is the same model."""
    return [(file.path, file.etag, file.size_bytes) for file in files]


def _digest(facts: dict[str, object]) -> str:
    return hashlib.sha256(canonical_json({"base": _VERSION, **facts})).hexdigest()[:_FINGERPRINT_DIGITS]


def _nothing(where: str) -> SpecError:
    return SpecError(
        f"model.pretrained: there is nothing at {where}.",
        next_step="Check the address: a folder with config.json and model.safetensors, or a *.gguf file.",
    )
