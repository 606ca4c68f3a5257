"""The submitted working directory as a zip that depends on nothing but its files' names and bytes."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from orchestrator.errors import UsageError

MAX_BYTES = 256 * 2**20
"""Ray keeps packages in its GCS, in memory; it refuses those above 512 MiB itself."""
IGNORE_FILE = ".headwayignore"
_ALWAYS_IGNORED = (".git", ".venv", "venv", ".headway", "__pycache__", "*.pyc", "node_modules")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


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
                skipped.append(f"{relative}: {reason}")
    return _Listing(files=tuple(sorted(files)), skipped=tuple(sorted(skipped)))


def _why_skipped(root: Path, path: Path) -> str | None:
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
    """Lengths go in first, so that no two trees give the same stream of bytes."""
    encoded = name.encode("utf-8", "surrogateescape")
    digest.update(f"{len(encoded)} {len(data)}\n".encode() + encoded + data)
