"""The submitted working directory as a zip that depends on nothing but its files' names and bytes."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from orchestrator.errors import IntegrityError, UsageError

MAX_BYTES = 256 * 2**20
"""Ray keeps packages in its GCS, in memory; it refuses those above 512 MiB itself."""
IGNORE_FILE = ".headwayignore"
_UNFINISHED = ".headway-unpacking"
_ALWAYS_IGNORED = (".git", ".venv", "venv", ".headway", _UNFINISHED, "__pycache__", "*.pyc", "node_modules")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_BLOCK_BYTES = 2**20
_NOT_A_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    NotImplementedError,  # a method of compression that this Python lacks
    OverflowError,
    RuntimeError,  # it wants a password
    ValueError,  # with UnicodeDecodeError among them
)
"""What ``zipfile`` raises for bytes that are no zip, or one that was damaged or made up."""


@dataclass(frozen=True, kw_only=True)
class Package:
    digest: str
    """SHA-256 over the relative paths and bytes, 64 hex digits."""
    data: bytes
    """The zip."""
    skipped: tuple[str, ...]
    """What was left out although nothing ignores it, each with its reason."""


@dataclass(frozen=True, kw_only=True)
class _Listing:
    files: tuple[str, ...]
    """Relative POSIX paths, sorted."""
    skipped: tuple[str, ...]


def package(directory: Path, *, max_bytes: int = MAX_BYTES) -> Package:
    """Pack a working directory.

    Raises:
        UsageError: it is no directory, is above ``max_bytes``, or a file cannot be read.
    """
    listing = _list(directory)
    _require_small(directory, listing.files, max_bytes)
    digest = hashlib.sha256()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in listing.files:
            data = _read(directory / name)
            _add(digest, name, data)
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, data)
    return Package(digest=digest.hexdigest(), data=buffer.getvalue(), skipped=listing.skipped)


def unpack(data: bytes, to: Path, digest: str, *, max_bytes: int = MAX_BYTES) -> None:
    """Put the files of a package into a folder: all of them with the bytes that its digest names, or none.

    The folder is new, or empty, or holds these files already: then nothing is written. A call that is killed leaves
    files that the next one takes away. Files get the mode 0644, folders 0755.

    Raises:
        IntegrityError: other files than the digest says, or a zip that :func:`package` never makes.
        UsageError: the folder holds something else.
    """
    with _no_surprises(digest), zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = _entries(archive, max_bytes)
        to.mkdir(parents=True, exist_ok=True)
        unfinished = to / _UNFINISHED
        if unfinished.exists():
            _clear(to)
        elif any(to.iterdir()):
            _require_same(to, [entry.filename for entry in entries], digest)
            return
        # Inside of the folder, which may be a mount: only there is a rename sure to stay on one file system.
        unfinished.mkdir()
        try:
            found = _extract(archive, entries, unfinished)
            if found != digest:
                raise IntegrityError(f"The files of code package {digest[:12]}… have the digest {found[:12]}….")
            for path in sorted(unfinished.iterdir()):
                path.rename(to / path.name)
        except BaseException:
            _clear(to)
            raise
        unfinished.rmdir()


def code_digest(directory: Path) -> str:
    """SHA-256 over the ``*.py`` files alone: what shapes the weights where the task is the user's own."""
    digest = hashlib.sha256()
    for name in _list(directory).files:
        if name.endswith(".py"):
            _add(digest, name, _read(directory / name))
    return digest.hexdigest()


def ignored(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Whether a relative path is ignored. Pure.

    A pattern without a slash matches a file's or folder's name anywhere; one with a slash matches from the top.
    A trailing slash is allowed. ``*`` also crosses folders.
    """
    for pattern in patterns:
        bare = pattern.rstrip("/")
        subject = str(path) if "/" in bare else path.name
        if fnmatch.fnmatchcase(subject, bare.lstrip("/")):
            return True
    return False


def _list(directory: Path) -> _Listing:
    if not directory.is_dir():
        raise UsageError(f"The working directory {directory} is not a directory.")
    root = directory.resolve()
    patterns = [*_ALWAYS_IGNORED, *_patterns(directory / IGNORE_FILE)]
    files: list[str] = []
    skipped: list[str] = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder).relative_to(root)

        def kept(candidates: Iterable[str], here: Path = here) -> list[str]:
            return [name for name in candidates if not ignored(PurePosixPath(here / name), patterns)]

        subfolders[:] = kept(subfolders)
        for name in [*kept(names), *(name for name in subfolders if (root / here / name).is_symlink())]:
            relative = (here / name).as_posix()
            reason = _why_skipped(root, root / here / name)
            if reason is None:
                files.append(relative)
            else:
                skipped.append(f"{_shown(relative)}: {reason}")
    return _Listing(files=tuple(sorted(files)), skipped=tuple(sorted(skipped)))


def _why_skipped(root: Path, path: Path) -> str | None:
    relative = str(path.relative_to(root))
    if _shown(relative) != relative:
        return "its name is not UTF-8"
    if path.is_symlink():
        target = path.resolve()
        if not target.is_relative_to(root):
            return "a link out of the working directory"
        if target.is_dir():
            return "a link to a folder"
        if not target.exists():
            return "a link to nothing"
    if not path.is_file():
        return "neither a file nor a folder"
    return None


def _shown(name: str) -> str:
    """A file's name as text that can be printed, also where its bytes are not UTF-8, which no zip can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _patterns(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}.") from e
    patterns = [line for line in lines if line and not line.startswith("#")]
    for pattern in patterns:
        if pattern.startswith("!"):
            raise UsageError(
                f"{path}: {pattern!r}: there is no exception to a pattern.", next_step="Take the line away."
            )
    return patterns


def _require_small(directory: Path, files: Sequence[str], max_bytes: int) -> None:
    sizes = {name: (directory / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total <= max_bytes:
        return
    biggest: dict[str, int] = {}
    for name, size in sizes.items():
        top = name.split("/", 1)[0]
        biggest[top] = biggest.get(top, 0) + size
    worst = sorted(biggest.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in worst)
    raise UsageError(
        f"The working directory {directory} is {total / 2**20:.0f} MiB; the limit is {max_bytes / 2**20:.0f} MiB. "
        f"The biggest in it: {shown}.",
        next_step=f"Name what is not needed in {IGNORE_FILE}, and put data into the store.",
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}.", next_step=f"Or name it in {IGNORE_FILE}") from e


def _add(digest: hashlib._Hash, name: str, data: bytes) -> None:
    _add_name(digest, name, len(data))
    digest.update(data)


def _add_name(digest: hashlib._Hash, name: str, num_bytes: int) -> None:
    """Before the bytes themselves. Lengths go in first, so that no two trees give the same stream of bytes."""
    encoded = name.encode()
    digest.update(f"{len(encoded)} {num_bytes}\n".encode() + encoded)


# -- unpacking


@contextmanager
def _no_surprises(digest: str) -> Iterator[None]:
    try:
        yield
    except _NOT_A_ZIP as e:
        raise IntegrityError(f"Code package {digest[:12]}… is no zip that Headway made: {e}.") from e


def _entries(archive: zipfile.ZipFile, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The files in the order of their names, once it is sure that they may be written. Pure."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    names = {entry.filename for entry in entries}
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for entry in entries:
        reason = "is also a folder" if entry.filename in folders else _why_refused(entry)
        if reason:
            raise IntegrityError(f"The code package holds {entry.orig_filename!r}, which {reason}.")
    if len(names) != len(entries):
        raise IntegrityError("The code package holds a name twice.")
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        raise IntegrityError(
            f"The code package unpacks to {total / 2**20:.0f} MiB; the limit is {max_bytes / 2**20:.0f} MiB."
        )
    return entries


def _why_refused(entry: zipfile.ZipInfo) -> str | None:
    parts = entry.filename.split("/")
    if entry.filename != entry.orig_filename or any(part in ("", ".", "..") for part in parts):
        return "is no plain relative path"
    if parts[0] == _UNFINISHED:
        return "is a name of Headway's own"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or a device"
    return None


def _extract(archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], folder: Path) -> str:
    """Write the files. Returns the digest of what was written."""
    digest = hashlib.sha256()
    for entry in entries:
        path = folder / entry.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_name(digest, entry.filename, entry.file_size)
        with archive.open(entry) as source, path.open("xb") as file:
            for block in _blocks(source):
                digest.update(block)
                file.write(block)
    for path in folder.rglob("*"):  # whatever the umask is
        path.chmod(0o755 if path.is_dir() else 0o644)
    return digest.hexdigest()


def _require_same(folder: Path, names: Sequence[str], digest: str) -> None:
    """That a package's files are there with their bytes. What lies beside them, bytecode say, does not matter."""
    found = hashlib.sha256()
    try:
        for name in names:
            with (folder / name).open("rb") as file:
                _add_name(found, name, os.fstat(file.fileno()).st_size)
                for block in _blocks(file):
                    found.update(block)
        same = found.hexdigest() == digest
    except OSError:
        same = False
    if not same:
        raise UsageError(
            f"{folder} holds other files than those of code package {digest[:12]}….",
            next_step="Name an empty or a new folder.",
        )


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _clear(folder: Path) -> None:
    """Take away what an unfinished call left in a folder that was empty before it; last of all, the sign of that."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
