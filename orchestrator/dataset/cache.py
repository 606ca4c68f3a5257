"""Pieces of datasets on this node's disk, shared by all of its processes, with a limit on their size.

A piece is a file named by its digest, so datasets that share pieces share files. It appears whole, by a rename, under a
lock that lets one process of the node fetch what several want. The files that were opened longest ago are deleted
first; a process that has one mapped keeps its bytes until it lets go.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.document import QUANTITY
from orchestrator.errors import EnvironmentUnusable, UsageError
from orchestrator.node_cache import CACHE_VARIABLE, cache_directory
from orchestrator.target_settings import amount

logger = logging.getLogger(__name__)
LIMIT_VARIABLE = "HEADWAY_CACHE_LIMIT"
_LOCKS = "locks"
_LOCK_WAIT_S = 2.0  # then another process's fetch is taken to hang, and the piece is fetched beside it
_LOCK_POLL_S = 0.005
_SHARE_OF_DISK = 0.5
_SLACK = 16  # a sixteenth of the limit is deleted at a time, and added before the next look
_STALE_S = 3600.0  # a partial file that old is nobody's any more

Bytes = npt.NDArray[np.uint8]


def size_of_environment(variable: str) -> int | None:
    """The bytes that a variable names, in Kubernetes' notation; None where it is not set.

    Raises:
        UsageError: it holds no size.
    """
    told = os.environ.get(variable, "").strip()
    if not told:
        return None
    size = int(amount(told)) if re.fullmatch(QUANTITY, told) else 0
    if size < 1:
        raise UsageError(f"{variable}: {told!r} is no size.", next_step="Write it as 200Gi, say.")
    return size


class PieceCache:
    """A folder of pieces. Safe to use from several threads and processes.

    Args:
        limit_bytes: of all files in the folder. None is ``HEADWAY_CACHE_LIMIT``, such as ``200Gi``; where that is not
            set, half of what the disk has free and the cache holds already.

    Raises:
        EnvironmentUnusable: the folder cannot be made. UsageError: the variable holds no size.
    """

    def __init__(self, directory: Path | None = None, *, limit_bytes: int | None = None) -> None:
        self.folder = (directory or cache_directory()) / "pieces"
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            self.limit_bytes = limit_bytes or size_of_environment(LIMIT_VARIABLE) or self._share_of_disk()
        except OSError as e:
            raise EnvironmentUnusable(
                f"Data cannot be kept in {self.folder}: {e.strerror or e}.",
                next_step=f"Set {CACHE_VARIABLE} to a folder that can be written to.",
            ) from e
        self.num_evicted = 0
        self.is_refused = False
        """Whether the disk has not taken a piece."""
        self._added_bytes = 0
        self._verified: set[tuple[str, int, int]] = set()
        self._lock = threading.Lock()

    def open(self, sha256: str, num_bytes: int) -> Bytes | None:
        """The piece, mapped into memory and checked; None where it is not here, or damaged and therefore deleted.

        Its bytes are hashed when this process first opens the file, and not again while it is the same file.
        """
        path = self._path(sha256)
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size != num_bytes:
                    self._discard(path)
                    return None
                mapped = mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ)
        except OSError:  # most often there is none
            return None
        mark = (sha256, found.st_ino, found.st_mtime_ns)
        if mark not in self._verified:
            if hashlib.sha256(mapped).hexdigest() != sha256:
                self._discard(path)
                return None
            self._verified.add(mark)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        return np.frombuffer(mapped, dtype=np.uint8)

    def add(self, sha256: str, data: bytes | bytearray) -> Bytes | None:
        """Keep a piece, whose bytes the caller has checked, and map it; None where the disk does not take it."""
        path = self._path(sha256)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb+") as file:
                file.write(data)
                file.flush()
                mapped = mmap.mmap(file.fileno(), len(data), prot=mmap.PROT_READ)
                found = os.fstat(file.fileno())
            partial.replace(path)
        except OSError as e:
            with contextlib.suppress(OSError):
                partial.unlink()
            with self._lock:
                is_first, self.is_refused = not self.is_refused, True
            if is_first:
                logger.warning("Data is not kept in %s from here on: %s.", self.folder, e.strerror or e)
            return None
        self._verified.add((sha256, found.st_ino, found.st_mtime_ns))
        with self._lock:
            self._added_bytes += len(data)
            is_time = self._added_bytes >= self.limit_bytes // _SLACK
            self._added_bytes = 0 if is_time else self._added_bytes
        if is_time:
            self.evict()
        return np.frombuffer(mapped, dtype=np.uint8)

    @contextlib.contextmanager
    def fetching(self, sha256: str) -> Iterator[None]:
        """Around a look for a piece and its fetch: whoever else wants it waits meanwhile, though not for long."""
        file = None
        with contextlib.suppress(OSError):  # a lock that cannot be had costs a second fetch, and nothing else
            file = (self.folder / _LOCKS / sha256[:3]).open("wb")
        try:
            deadline_s = time.monotonic() + _LOCK_WAIT_S
            while file is not None and not _locked(file.fileno()) and time.monotonic() < deadline_s:
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            if file is not None:
                file.close()

    def evict(self) -> None:
        """Delete what was opened longest ago until the rest is within the limit, with some room for what comes."""
        with contextlib.suppress(OSError), (self.folder / _LOCKS / "evict").open("wb") as lock:
            if not _locked(lock.fileno()):
                return  # another process is at it
            files = sorted(self._files())
            excess = sum(size for _, size, _ in files) - self.limit_bytes * (_SLACK - 1) // _SLACK
            for _, size, path in files:
                if excess <= 0:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    self.num_evicted += 1
                excess -= size

    def held_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """When each piece was last opened, its size and its path. What a process that died left half is deleted."""
        for folder in os.scandir(self.folder):
            if folder.name == _LOCKS or not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(OSError):
                    found = entry.stat()
                    if entry.name.endswith(".partial") and time.time() - found.st_mtime > _STALE_S:
                        os.unlink(entry.path)
                        continue
                    yield found.st_atime_ns, found.st_size, entry.path

    def _discard(self, path: Path) -> None:
        logger.warning("%s is damaged on this disk; it is fetched anew.", path)
        with contextlib.suppress(OSError):
            path.unlink()

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / f"{sha256}.bin"

    def _share_of_disk(self) -> int:
        return int(_SHARE_OF_DISK * (shutil.disk_usage(self.folder).free + self.held_bytes()))


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
