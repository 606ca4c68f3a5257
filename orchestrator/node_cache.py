"""The folder on a node's disk where what came from the store is kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "HEADWAY_CACHE"
NUM_KEPT = 3
"""Of the directories of one kind, such as versions, as many stay as were used last, with the one in use."""
IN_USE_S = 3600.0
"""A directory that was used within this time stays too: a process may be about to read it."""
STALE_S = 24 * 3600.0
"""What is half made and that old is nobody's any more: a download of a large model may take hours."""
_PARTIAL, _LOCK = ".partial", ".lock"


def cache_directory() -> Path:
    """``HEADWAY_CACHE``, else ``~/.cache/headway``; shared by all processes of the node. It need not be there yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "headway")


@contextlib.contextmanager
def taking(directory: Path) -> Iterator[None]:
    """Around a look for a directory of the cache and its making: whoever else wants it waits meanwhile.

    Afterwards the directories beside it that were not used for longest are deleted, and what dead processes left half
    made. A process that has opened files of one keeps them.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a lock that cannot be had costs a second download, and nothing else
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((directory.parent / f".{directory.name}{_LOCK}").open("wb"))
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        yield
    with contextlib.suppress(OSError):  # what cannot be deleted now can be later
        os.utime(directory)
        _tidy(directory.parent)


def discard(directory: Path) -> None:
    """Take a directory away at once, so that another may take its name, and delete it."""
    aside = partial_of(directory)
    with contextlib.suppress(OSError):
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def partial_of(directory: Path) -> Path:
    """A name beside it, and nobody else's, for what is half made or half deleted."""
    return directory.with_name(f".{directory.name}.{secrets.token_hex(4)}{_PARTIAL}")


def _tidy(folder: Path) -> None:
    now_s = time.time()
    with os.scandir(folder) as entries:
        used = sorted(((entry.stat().st_mtime, entry.name) for entry in entries), reverse=True)
    for number, (used_s, name) in enumerate([each for each in used if not each[1].startswith(".")]):
        if number >= NUM_KEPT and now_s - used_s > IN_USE_S:
            discard(folder / name)
    for used_s, name in used:
        if now_s - used_s <= STALE_S:
            continue
        if name.endswith(_PARTIAL):
            shutil.rmtree(folder / name, ignore_errors=True)
        elif name.endswith(_LOCK) and not (folder / name[1:].removesuffix(_LOCK)).exists():
            (folder / name).unlink()
