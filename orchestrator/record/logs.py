"""Logs that outlive the cluster: ``runs/<run-id>/logs/<pod>/<session>/<file>/<00001>``, numbered chunks of text.

``<session>`` is Ray's folder of one start of a node, ``<file>`` a path below its ``logs/``. A chunk is created and
never written again; the chunks of a file in the order of their numbers are its bytes. Where a file begins anew under
the same name, because it was rotated or cut, the new one is stored as ``<file>~2``.
"""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from orchestrator.errors import AlreadyExists, StoreError
from orchestrator.store import ObjectInfo, Store, layout

LOOK_S = 10.0
"""How often a follower looks for files that are new; text of those that it knows comes with each poll."""
_UNCLEAN = re.compile(r"[^A-Za-z0-9._+=@/-]")
_CHUNK = re.compile(r"(?P<pod>[^/]+)/(?P<session>[^/]+)/(?P<name>.+)/(?P<number>\d{5,})")


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """What is stored of one file."""

    pod: str
    session: str
    name: str
    num_chunks: int = 0
    size_bytes: int = 0
    last_chunk_bytes: int = 0
    first_s: float = 0.0
    """When the first chunk was stored, by S3's clock, seconds since the epoch."""
    modified_s: float = 0.0

    def prefix(self, run_id: str) -> str:
        return f"{layout.logs(run_id)}{self.pod}/{self.session}/{self.name}/"

    def chunk(self, run_id: str, number: int) -> str:
        return self.prefix(run_id) + layout.number(number)

    def with_chunk(self, number: int, item: ObjectInfo) -> LogFile:
        """This file once one more of its chunks has been seen. Pure."""
        return replace(
            self,
            num_chunks=max(self.num_chunks, number),
            size_bytes=self.size_bytes + item.size_bytes,
            last_chunk_bytes=item.size_bytes if number > self.num_chunks else self.last_chunk_bytes,
            first_s=item.modified_s if number == 1 else self.first_s,
            modified_s=max(self.modified_s, item.modified_s),
        )


def clean(name: str) -> str:
    """A name as it is stored: what may be misread in a key becomes ``_``. Pure."""
    return _UNCLEAN.sub("_", name)


def base_name(name: str) -> str:
    """``serve/proxy.log~2`` → ``serve/proxy.log``. Pure: :func:`clean` leaves no ``~`` of the file's own."""
    return name.partition("~")[0]


def nth_name(name: str, nth: int) -> str:
    """The name of the ``nth`` file (from 1) that was seen as ``name``. Pure."""
    return name if nth == 1 else f"{name}~{nth}"


def list_files(store: Store, run_id: str, under: str = "") -> list[LogFile]:
    """The files stored of a run, or of its ``<pod>/`` or ``<pod>/<session>/``."""
    root = layout.logs(run_id)
    found: dict[tuple[str, str, str], LogFile] = {}
    for item in store.list(root + under):
        match = _CHUNK.fullmatch(item.key.removeprefix(root))
        if match is None:
            continue
        place = match["pod"], match["session"], match["name"]
        known = found.get(place) or LogFile(pod=place[0], session=place[1], name=place[2])
        found[place] = known.with_chunk(int(match["number"]), item)
    return list(found.values())


class LogWriter:
    """Appends to one stored file; nothing else does so at the same time, but a forerunner of this process may have."""

    def __init__(self, store: Store, run_id: str, file: LogFile) -> None:
        self._store, self._run_id = store, run_id
        self.file = file

    def append(self, data: bytes) -> None:
        """Store the bytes that follow :attr:`file`'s ``size_bytes`` as its next chunk.

        Where a chunk stands there already, it holds such bytes too, maybe fewer: an answer was lost, or a process
        that was killed had sent it. It is taken as it is, so ``size_bytes`` says what to send next.

        Raises:
            StoreError: it may have been stored; the next call finds out.
        """
        number = self.file.num_chunks + 1
        key = self.file.chunk(self._run_id, number)
        try:
            self._store.create(key, data)
            item = ObjectInfo(key=key, size_bytes=len(data), etag="", modified_s=time.time())
        except AlreadyExists as e:
            standing = next(self._store.list(key), None)
            if standing is None:
                raise StoreError(f"{self._store.uri_of(key)} exists and is not listed.") from e
            item = standing
        self.file = self.file.with_chunk(number, item)

    def sample(self, *, num_bytes: int, at_start: bool = False) -> tuple[int, bytes]:
        """Some of what is stored, with where it begins: the last bytes, or the first."""
        if at_start:
            return 0, self._store.get_range(self.file.chunk(self._run_id, 1), 0, num_bytes)
        length = min(num_bytes, self.file.last_chunk_bytes)
        key = self.file.chunk(self._run_id, self.file.num_chunks)
        return self.file.size_bytes - length, self._store.get_range(key, self.file.last_chunk_bytes - length, length)


class LogReader:
    """The stored logs of a run."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id

    def files(self) -> list[LogFile]:
        """Everything that is stored, in the order of pod, session and name."""
        return list_files(self._store, self._run_id)

    def read(self, file: LogFile) -> Iterator[str]:
        """A file's text, chunk by chunk. What is not UTF-8 becomes U+FFFD."""
        tail = self._tail(file)
        yield from tail.poll()
        yield tail.rest()

    def driver_log(self, job: str) -> list[LogFile]:
        """The logs of a job's driver in the order of their first chunks: several where the job was started again."""
        root = layout.logs(self._run_id)
        name = clean(f"job-driver-{job}.log")
        found: list[LogFile] = []
        for pod in self._store.list_folders(root):
            for session in self._store.list_folders(f"{root}{pod}/"):
                files = list_files(self._store, self._run_id, f"{pod}/{session}/{name}")
                found += [file for file in files if base_name(file.name) == name]
        return sorted(found, key=lambda file: (file.first_s, file.pod, file.session, len(file.name), file.name))

    def follow(self, job: str, *, clock: Callable[[], float] = time.monotonic) -> DriverLog:
        """The log of a job's driver as it grows."""
        return DriverLog(self, job, clock=clock)

    def _tail(self, file: LogFile) -> _Tail:
        return _Tail(self._store, file.prefix(self._run_id))


class DriverLog:
    """Reads the log of a job's driver as it comes: each :meth:`poll` gives the text that is new, from the first on."""

    def __init__(self, reader: LogReader, job: str, *, clock: Callable[[], float]) -> None:
        self._reader, self._job, self._clock = reader, job, clock
        self._tails: dict[tuple[str, str, str], _Tail] = {}
        self._looked_s: float | None = None

    def poll(self) -> Iterator[str]:
        """New text, piece by piece. A character whose bytes have not all come waits for the next poll."""
        now = self._clock()
        if not self._tails or self._looked_s is None or now - self._looked_s >= LOOK_S:
            self._looked_s = now
            for file in self._reader.driver_log(self._job):
                self._tails.setdefault((file.pod, file.session, file.name), self._reader._tail(file))
        for tail in self._tails.values():
            yield from tail.poll()

    def finish(self) -> Iterator[str]:
        """What is left once nothing more will come: a last look, then characters that were never finished."""
        self._looked_s = None
        yield from self.poll()
        for tail in self._tails.values():
            yield tail.rest()


class _Tail:
    """One file's text from where it was read to."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._read_to = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def poll(self) -> Iterator[str]:
        for item in self._store.list(self._prefix, start_after=self._read_to):
            if not item.key.removeprefix(self._prefix).isdecimal():
                continue
            data = self._store.get(item.key)
            self._read_to = item.key
            yield self._decoder.decode(data)

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)
