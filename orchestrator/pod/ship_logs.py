"""Beside Ray in a pod: copies its logs into the store as they grow, so that they outlive the cluster."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import HeadwayError
from orchestrator.pod.log_files import Found, is_related, read_at, scan
from orchestrator.record.logs import LogFile, LogWriter, base_name, clean, list_files, nth_name
from orchestrator.store import Store
from orchestrator.store.s3 import Patience

PATIENCE = Patience(attempts=2, connect_timeout_s=3.0, read_timeout_s=10.0, first_wait_s=0.5)
"""The shipper itself tries again, so that one request holds up the end of a pod no longer than this."""
LAST_PASS_S = 20.0
"""How long the end of a pod waits for the rest of its logs."""
POLL_S = 1.0
_LONGEST_WAIT_S = 30.0
_MAX_CHUNKS = 99_998  # and one that says so: the numbers of five digits
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be read and stored."""

    chunk_bytes: int = 256 * 2**10
    """So much new text is sent at once, without waiting for its time."""
    read_bytes: int = 2**20
    """The most that is read, held in memory and stored as one chunk."""
    file_bytes: int = 2**30
    """The most that is stored of one file."""
    num_files: int = 2000
    """The most files that are stored of one pod."""
    num_errors: int = 3
    """So many files may fail in one pass; then it ends, for the store will not answer for the others either."""


@dataclass(kw_only=True)
class _Tracked:
    """A file that is being stored."""

    writer: LogWriter
    size_bytes: int
    """As it was seen last."""
    pending_s: float | None = None
    """Since when it has text that is not stored."""


@dataclass(kw_only=True)
class _Session:
    """What is known of a session's files."""

    stored: dict[str, LogFile]
    """What an earlier shipper, or this one, stored of files that are not on the disk now, or not recognised yet."""
    names: set[str] = field(default_factory=set)
    """All names that are taken."""


class LogShipper:
    """Stores what is new in the log files under Ray's folder; each :meth:`ship` is one pass over them.

    A file is known by its inode, so one that is renamed (a rotation, or Ray's ``logs/old/``) goes on under the name
    that it had first, and one that takes its place is another. A file that shrinks begins anew. After a restart a file
    continues the stored one whose last bytes it holds at the same place.

    Not safe to use from several threads.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        root: Path,
        pod: str,
        say: Callable[[str], None],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._run_id, self._root, self._say = store, run_id, root, say
        self._pod = clean(pod).replace("/", "_")
        self._limits, self._clock = limits or Limits(), clock
        self._started_s = clock()
        self._sessions: dict[str, _Session] = {}
        self._tracked: dict[tuple[int, int], _Tracked] = {}
        self._said: set[str] = set()

    def ship(self, *, everything: bool = False) -> None:
        """Store what is due, or everything.

        Raises:
            HeadwayError: of the files that failed, the first one's; what could not be stored is kept for the next pass.
        """
        found = scan(self._root)
        self._forget_all_but(found)
        errors: list[HeadwayError] = []
        for file in found:
            try:
                self._ship_file(file, everything=everything)
            except HeadwayError as e:
                errors.append(e)
                if len(errors) == self._limits.num_errors:
                    break
            except OSError as e:
                self._say_once(f"{file.path} cannot be read: {e.strerror}.")
        if errors:
            raise errors[0]

    def _forget_all_but(self, found: list[Found]) -> None:
        """A file that is renamed during the scan is missed by it: the next pass continues it, as after a restart."""
        for inode in self._tracked.keys() - {file.inode for file in found}:
            stored = self._tracked.pop(inode).writer.file
            if stored.num_chunks:
                self._sessions[stored.session].stored[stored.name] = stored

    def _ship_file(self, file: Found, *, everything: bool) -> None:
        tracked = self._track(file)
        if tracked is None or self._is_closed(tracked.writer.file):
            return
        pending_bytes, now = file.size_bytes - tracked.writer.file.size_bytes, self._clock()
        if pending_bytes <= 0:
            return
        if tracked.pending_s is None:
            tracked.pending_s = now
        age_s = now - tracked.pending_s
        if everything or pending_bytes >= self._limits.chunk_bytes or age_s >= longest_wait_s(now - self._started_s):
            self._send(file, tracked.writer)
            tracked.pending_s = None

    def _send(self, file: Found, writer: LogWriter) -> None:
        """Store the file up to the size that it was found with, or to its limit."""
        while (stored := writer.file).size_bytes < file.size_bytes:
            left = self._limits.file_bytes - stored.size_bytes
            if left <= 0 or stored.num_chunks >= _MAX_CHUNKS:
                writer.append(b"\n[headway: this file's limit is reached; the rest of it is not stored]\n")
                return
            length = min(self._limits.read_bytes, left, file.size_bytes - stored.size_bytes)
            data = read_at(file, stored.size_bytes, length)
            if not data:  # it was cut or replaced since it was found
                return
            writer.append(data)

    def _is_closed(self, file: LogFile) -> bool:
        return file.size_bytes > self._limits.file_bytes or file.num_chunks > _MAX_CHUNKS

    # -- which stored file a file on the disk continues

    def _track(self, file: Found) -> _Tracked | None:
        """The file's place in the store; None where it has none, being empty or one too many."""
        tracked = self._tracked.get(file.inode)
        if tracked is not None and self._is_continued(tracked, file):
            tracked.size_bytes = file.size_bytes
            return tracked
        self._tracked.pop(file.inode, None)
        if file.size_bytes == 0:
            return None
        session = self._session(file.session)
        stored = self._find_stored(session, file)
        if stored is None:
            if sum(len(known.names) for known in self._sessions.values()) >= self._limits.num_files:
                self._say_once(f"{self._limits.num_files} files are stored; others of this pod are not.")
                return None
            stored = LogFile(pod=self._pod, session=file.session, name=_free_name(session, file.name))
        session.stored.pop(stored.name, None)
        session.names.add(stored.name)
        writer = LogWriter(self._store, self._run_id, stored)
        tracked = self._tracked[file.inode] = _Tracked(writer=writer, size_bytes=file.size_bytes)
        return tracked

    def _is_continued(self, tracked: _Tracked, file: Found) -> bool:
        """Whether the inode is still that file. A shorter one was cut; one of another name took over a freed inode."""
        shrunk = file.size_bytes < tracked.size_bytes and tracked.writer.file.num_chunks > 0
        return not shrunk and is_related(base_name(tracked.writer.file.name), file.name)

    def _session(self, name: str) -> _Session:
        known = self._sessions.get(name)
        if known is None:
            stored = {file.name: file for file in list_files(self._store, self._run_id, f"{self._pod}/{name}/")}
            known = self._sessions[name] = _Session(stored=stored, names=set(stored))
        return known

    def _find_stored(self, session: _Session, file: Found) -> LogFile | None:
        """What an earlier shipper stored of this very file."""
        related = [stored for stored in session.stored.values() if is_related(base_name(stored.name), file.name)]
        for stored in sorted(related, key=lambda stored: -stored.first_s):
            closed = self._is_closed(stored)  # it ends with words of our own
            if not closed and stored.size_bytes > file.size_bytes:
                continue
            writer = LogWriter(self._store, self._run_id, stored)
            start, sample = writer.sample(num_bytes=_SAMPLE_BYTES, at_start=closed)
            if read_at(file, start, len(sample)) == sample:
                return stored
        return None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _free_name(session: _Session, name: str) -> str:
    nth = 1
    while nth_name(name, nth) in session.names:
        nth += 1
    return nth_name(name, nth)


def longest_wait_s(elapsed_s: float) -> float:
    """How old text may grow before it is stored: a young run is seen live, a long one makes few objects. Pure."""
    return min(60.0, 5.0 + elapsed_s / 100)


# -- the program


def ship_logs(shipper: LogShipper, *, say: Callable[[str], None], last_pass_s: float = LAST_PASS_S) -> bool:
    """Ship until SIGTERM or SIGINT, then once more for ``last_pass_s`` at most. Returns whether everything is stored.

    Call it from the main thread. A pass that does not end in time is left behind in its thread.

    Raises:
        RuntimeError: shipping ended by itself, by an error of its own that is on stderr.
    """
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before the thread, which inherits it
    told = threading.Event()
    worker = threading.Thread(target=keep_shipping, args=(shipper, told, say), name="ship-logs", daemon=True)
    worker.start()
    while signal.sigtimedwait(ends, POLL_S) is None:
        if not worker.is_alive():
            raise RuntimeError("Shipping logs has ended by itself.")
    told.set()
    worker.join(last_pass_s)
    return not worker.is_alive()


def keep_shipping(shipper: LogShipper, told: threading.Event, say: Callable[[str], None]) -> None:
    """Pass after pass until it is told to end, then until everything is stored. No failure of the store ends it."""
    num_failures = 0
    while not told.is_set():
        num_failures = _pass(shipper, num_failures, say, everything=False)
        told.wait(pause_s(num_failures))
    while True:  # once more from the start, for what came during the last pass
        num_failures = _pass(shipper, num_failures, say, everything=True)
        if num_failures == 0:
            return
        time.sleep(POLL_S)


def _pass(shipper: LogShipper, num_failures: int, say: Callable[[str], None], *, everything: bool) -> int:
    """One pass. Returns how many have failed in a row."""
    try:
        shipper.ship(everything=everything)
    except HeadwayError as e:
        if num_failures == 0:
            say(f"Logs are not stored for now: {e}")
        return num_failures + 1
    if num_failures:
        say("Logs are stored again.")
    return 0


def pause_s(num_failures: int) -> float:
    """How long to wait before the next pass, after so many failures in a row. Pure."""
    return min(_LONGEST_WAIT_S, POLL_S * 2.0 ** min(num_failures, 10))
