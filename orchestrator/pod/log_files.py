"""The log files that Ray writes in a pod: finding them, and reading one that may be renamed or cut meanwhile."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.record.logs import clean

_LOG = re.compile(r"(?P<stem>.+?)(\.\d+)?(?P<kind>\.(log|out|err))(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A log file as it lies on the disk now."""

    path: Path
    session: str
    name: str
    """Below the session's ``logs/``, as it is stored."""
    inode: tuple[int, int]
    size_bytes: int


def scan(root: Path) -> list[Found]:
    """The log files of all sessions under Ray's folder, each once: drivers' first, then workers', then the others."""
    found = {file.inode: file for session in _sessions(root) for file in _files(session)}
    return sorted(found.values(), key=lambda file: (_rank(file.name), file.session, file.name))


def _rank(name: str) -> int:
    if name.startswith("job-driver-"):
        return 0
    return 1 if name.startswith("worker-") else 2


def _sessions(root: Path) -> Iterator[Path]:
    try:
        with os.scandir(root) as entries:
            yield from (
                Path(entry.path)
                for entry in entries
                if entry.name.startswith("session_") and entry.is_dir(follow_symlinks=False)
            )
    except OSError:  # Ray has not made it yet
        return


def _files(session: Path) -> Iterator[Found]:
    logs = session / "logs"
    if logs.is_symlink():
        return
    for folder, _, names in os.walk(logs):  # links to folders are not followed
        for name in names:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError:  # renamed or deleted just now
                continue
            if stat.S_ISREG(status.st_mode) and _LOG.fullmatch(name):
                yield Found(
                    path=path,
                    session=clean(session.name),
                    name=clean(path.relative_to(logs).as_posix()),
                    inode=(status.st_dev, status.st_ino),
                    size_bytes=status.st_size,
                )


def read_at(file: Found, start: int, num_bytes: int) -> bytes:
    """Bytes of a file that was found; none where another has taken its name.

    Raises:
        OSError: it may not be read.
    """
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != file.inode:
            return b""
        return os.pread(descriptor, num_bytes, start)
    finally:
        os.close(descriptor)


def is_related(one: str, other: str) -> bool:
    """Whether two names may be of one file before and after a rotation or a move to another folder. Pure."""
    return _without_number(one) == _without_number(other)


def _without_number(name: str) -> str:
    """``old/raylet.1.out`` and ``raylet.out.1`` → ``raylet.out``. Pure."""
    match = _LOG.fullmatch(name.rpartition("/")[2])
    return match["stem"] + match["kind"] if match else name
