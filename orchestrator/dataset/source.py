"""The files that a run file's ``data.train`` names, listed without reading them where the source is S3."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.dataset.format import fingerprint
from orchestrator.errors import EmptySource, EnvironmentUnusable, IntegrityError, NotFound, RunError, SpecError
from orchestrator.spec import DataSpec
from orchestrator.store.s3 import Store, split_uri

_WILD = re.compile(r"[*?]")
_LINE_BYTES = 2**16  # read at a time for the rest of a slice's last line


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    uri: str
    """``s3://bucket/key``, or an absolute path."""
    path: str
    """Relative to the source's fixed part: what decides the split, and stays when the source moves."""
    etag: str
    """Changes when the content does: S3's ETag, or the SHA-256 of a local file."""
    size_bytes: int
    left_out: str = ""
    """Why the file is no part of a source tree, a key of :data:`LEFT_OUT`; empty for the others."""


LEFT_OUT = {
    "hidden": "hidden files and folders, whose name starts with a dot",
    "dependency": "folders of dependencies, of version control and of caches",
    "too_large": "files over 1 MiB",
    "binary": "files with a NUL in their first 8 KiB, or that are not UTF-8",
}
"""What does not belong to a source tree. The last is known once a file is read."""
DEPENDENCY_FOLDERS = frozenset(
    ("node_modules", "bower_components", "site-packages", "__pycache__", "venv", "virtualenv", "CVS", "_darcs")
)
MAX_SOURCE_BYTES = 2**20
MAX_DOCUMENT_BYTES = 2**28


def list_source(pattern: str, store: Store, *, tree: bool = False) -> list[SourceFile]:
    """All files that match, in the order of their path.

    Args:
        tree: ``data.format: source``. Files that do not belong to a source tree are marked as left out, and not read.

    Raises:
        EmptySource: nothing matches. StoreError: the bucket cannot be listed.
    """
    base, matches = _compile(pattern)
    if pattern.startswith("s3://"):
        bucket, prefix = split_uri(base)
        prefix += "/" if base.endswith("/") and prefix else ""
        found = [
            SourceFile(
                uri=f"s3://{bucket}/{item.key}",
                path=item.key[len(prefix) :].lstrip("/") or item.key.rsplit("/", 1)[-1],
                etag=item.etag,
                size_bytes=item.size_bytes,
            )
            for item in store.at(bucket).list(prefix)
            if item.size_bytes and matches.fullmatch(f"s3://{bucket}/{item.key}")
        ]
    else:
        found = [_local(path, base, tree=tree) for path in _walk(Path(base)) if matches.fullmatch(str(path))]
    if tree:
        found = [replace(file, left_out=left_out_of_tree(file.path, file.size_bytes)) for file in found]
    if all(file.left_out for file in found):
        raise EmptySource(
            f"data.train: {pattern!r} matches no file that holds anything.",
            next_step="Check the address; ** crosses folders, * does not.",
        )
    return sorted(found, key=lambda file: file.path)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The lines of a file that begin in the ``number``-th of ``of`` equal stretches of its bytes."""

    file: SourceFile
    number: int = 0
    of: int = 1

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes // self.of


def left_out_of_tree(path: str, size_bytes: int) -> str:
    """Why a file does not belong to a source tree, as far as its name and size tell; empty where it may."""
    folders = path.split("/")
    if any(name.startswith(".") for name in folders):
        return "hidden"
    if DEPENDENCY_FOLDERS.intersection(folders[:-1]):
        return "dependency"
    return "too_large" if size_bytes > MAX_SOURCE_BYTES else ""


def source_fingerprint(data: DataSpec, files: list[SourceFile], tokenizer_fingerprint: str = "") -> str:
    """The fingerprint of the dataset that preparing these files gives.

    Args:
        tokenizer_fingerprint: of the tokenizer that is given, or the pretrained model's; empty where one is trained.
    """
    listing = [(file.path, file.etag, file.size_bytes) for file in files if not file.left_out]
    return fingerprint(data, listing, tokenizer_fingerprint)


def require_documents_that_fit(data: DataSpec, files: Sequence[SourceFile]) -> None:
    """
    Raises:
        SpecError: a text file, which is one document, is too large to be tokenized in memory.
    """
    largest = max(files, key=lambda file: file.size_bytes, default=None)
    if data.format == "text" and largest is not None and largest.size_bytes > MAX_DOCUMENT_BYTES:
        raise SpecError(
            f"data.format: text makes {largest.uri} one document of {largest.size_bytes / 2**20:,.0f} MiB; the limit "
            f"is {MAX_DOCUMENT_BYTES // 2**20} MiB, since tokenizing takes some 90 times that in memory.",
            next_step="Write its documents as JSON lines or Parquet, and set data.format; or divide the file.",
        )


def read_source(file: SourceFile, store: Store) -> bytes:
    """A source file's bytes.

    Raises:
        RunError: it is another file than the one that was listed.
    """
    if file.uri.startswith("s3://"):
        bucket, key = split_uri(file.uri)
        with _as_listed(file):
            return store.at(bucket).get_unchanged(key, file.etag)
    try:
        content = Path(file.uri).read_bytes()
    except OSError as e:
        raise _unreadable(file, e) from e
    with _as_listed(file):
        if hashlib.sha256(content).hexdigest() != file.etag:
            raise IntegrityError(file.uri)
    return content


def read_lines(part: Slice, store: Store) -> bytes:
    """The lines of a slice, whole ones: a line belongs to the slice in which its first byte lies."""
    file = part.file
    if part.of == 1:
        return read_source(file, store)
    start, end = (file.size_bytes * border // part.of for border in (part.number, part.number + 1))
    before = max(0, start - 1)  # where this byte ends a line, the slice starts with a line of its own
    content = read_range(file, store, before, end - before)
    if start:
        first = content.find(b"\n") + 1
        if not first:
            return b""
        content = content[first:]
    while end < file.size_bytes and content and not content.endswith(b"\n"):
        more = read_range(file, store, end, _LINE_BYTES)
        if not more:
            break
        end += len(more)
        rest = more.find(b"\n") + 1
        content += more[:rest] if rest else more
    return content


def read_range(file: SourceFile, store: Store, start: int, num_bytes: int) -> bytes:
    """``num_bytes`` bytes of a source file from ``start``; fewer come back only at its end.

    Raises:
        RunError: in S3 it is another file than the one that was listed; on disk it has another length.
    """
    if file.uri.startswith("s3://"):
        bucket, key = split_uri(file.uri)
        with _as_listed(file):
            return store.at(bucket).get_unchanged(key, file.etag, start=start, num_bytes=num_bytes)
    try:
        with Path(file.uri).open("rb") as source:
            with _as_listed(file):
                if os.fstat(source.fileno()).st_size != file.size_bytes:
                    raise IntegrityError(file.uri)
            source.seek(start)
            return source.read(num_bytes)
    except OSError as e:
        raise _unreadable(file, e) from e


@contextmanager
def _as_listed(file: SourceFile) -> Iterator[None]:
    """Around the reading of a file that may have been written over, or deleted, since the source was listed."""
    try:
        yield
    except (IntegrityError, NotFound) as e:
        what = "is gone since" if isinstance(e, NotFound) else "was written over after"
        raise RunError(
            f"data.train: {file.uri} {what} the source was listed.",
            next_step="Submit again, which lists it anew, and leave the files alone while they are read.",
        ) from e


def _unreadable(file: SourceFile, error: OSError) -> EnvironmentUnusable:
    return EnvironmentUnusable(f"data.train: {file.uri} cannot be read: {error.strerror or error}.")


def _compile(pattern: str) -> tuple[str, re.Pattern[str]]:
    """The fixed folder that a pattern starts with, and the pattern as a regular expression."""
    if not pattern.startswith("s3://"):
        pattern = str(Path(pattern).expanduser().absolute())
    wild = _WILD.search(pattern)
    if wild is None:
        whole = re.escape(pattern.rstrip("/"))
        return pattern, re.compile(f"{whole}(/.*)?", re.DOTALL)
    base = pattern[: pattern.rfind("/", 0, wild.start()) + 1]
    return base, re.compile(_translate(pattern), re.DOTALL)


def _translate(pattern: str) -> str:
    out, position = [], 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            out.append("(?:.*/)?")
            position += 3
        elif pattern.startswith("**", position):
            out.append(".*")
            position += 2
        else:
            char = pattern[position]
            out.append({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)))
            position += 1
    return "".join(out)


def _walk(base: Path) -> list[Path]:
    found = [base] if base.is_file() else base.rglob("*")
    return [path for path in found if path.is_file() and path.stat().st_size]


def _local(path: Path, base: str, *, tree: bool) -> SourceFile:
    relative = str(path.relative_to(base)) if str(path) != base.rstrip("/") else path.name
    size_bytes = path.stat().st_size
    if tree and left_out_of_tree(relative, size_bytes):
        return SourceFile(uri=str(path), path=relative, etag="", size_bytes=size_bytes)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise EnvironmentUnusable(f"data.train: {path} cannot be read: {e.strerror or e}.") from e
    return SourceFile(uri=str(path), path=relative, etag=digest, size_bytes=size_bytes)
