"""Pieces: what comes late gets a rival, what comes damaged is asked for again, what is kept is bounded."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.dataset.cache import LIMIT_VARIABLE, PieceCache
from orchestrator.dataset.fetch import THREADS_VARIABLE, Fetcher
from orchestrator.dataset.pieces import Piece
from orchestrator.errors import IntegrityError, StoreError, UsageError
from tests.unit.fakes import MemoryStore

SIZE = 64
DATA = bytes(range(256)) * 2
NUM_PIECES = len(DATA) // SIZE


def piece(number: int, data: bytes = DATA) -> Piece:
    part = data[number * SIZE : (number + 1) * SIZE]
    return Piece(key="shard", start=number * SIZE, num_bytes=SIZE, sha256=hashlib.sha256(part).hexdigest())


class Server(MemoryStore):
    """A store whose next answers a test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.create("shard", DATA)
        self.answers: list[Callable[[bytes], bytes]] = []
        self.num_asked = 0

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self.num_asked += 1
        data = super().get_range(key, start, num_bytes)
        return self.answers.pop(0)(data) if self.answers else data


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def cache(tmp_path: Path) -> PieceCache:
    return PieceCache(tmp_path)


@pytest.fixture
def fetcher(server: Server, cache: PieceCache) -> Iterator[Fetcher]:
    fetcher = Fetcher(server, cache, num_threads=4)
    yield fetcher
    fetcher.close()


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_all_pieces_come_once_from_the_store(fetcher: Fetcher, server: Server) -> None:
    for _ in range(2):
        futures = [fetcher.submit(piece(number)) for number in range(NUM_PIECES)]
        assert b"".join(future.result(10).tobytes() for future in futures) == DATA
    # Of eight pieces four are the same bytes as four others, and are fetched by whoever comes first.
    counts = fetcher.counts()
    # On a busy machine one may have had a rival, which may not have come to the store yet.
    assert 4 <= server.num_asked <= 4 + counts.get("hedged", 0)
    assert counts["fetched_pieces"] == 4
    assert counts["fetched_bytes"] == 4 * SIZE
    assert counts["cached_pieces"] == 12


def test_a_request_that_lags_gets_a_rival(fetcher: Fetcher, server: Server) -> None:
    hangs = threading.Event()

    def lag(data: bytes) -> bytes:
        hangs.wait(30)
        return data

    server.answers = [lag]
    assert fetcher.submit(piece(1)).result(10).tobytes() == DATA[SIZE : 2 * SIZE]
    counts = fetcher.counts()
    assert (counts["hedged"], counts["hedges_won"]) == (1, 1)
    hangs.set()


def test_a_server_that_is_slow_throughout_gets_no_storm(fetcher: Fetcher, server: Server) -> None:
    """One in ten requests may have a rival; here all lag, and the first alone gets one."""
    may_answer, rival = threading.Event(), threading.Event()

    def lag(data: bytes) -> bytes:
        if len(server.answers) <= 3:  # of eight: this is the fifth request, for four pieces
            rival.set()
        may_answer.wait(60)
        return data

    server.answers = [lag] * 8
    futures = [fetcher.submit(piece(number)) for number in range(4)]
    assert rival.wait(60)
    assert not may_answer.wait(0.5)  # in which the others would have got theirs
    may_answer.set()
    assert b"".join(future.result(10).tobytes() for future in futures) == DATA[: 4 * SIZE]
    assert fetcher.counts()["hedged"] == 1


def test_a_rival_does_not_hide_that_both_fail(fetcher: Fetcher, server: Server) -> None:
    def fail(data: bytes) -> bytes:
        raise StoreError("down")

    def lag_and_fail(data: bytes) -> bytes:
        threading.Event().wait(0.5)
        return fail(data)

    server.answers = [lag_and_fail, fail]
    with pytest.raises(StoreError, match="down"):
        fetcher.submit(piece(0)).result(10)


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_what_came_damaged_is_asked_for_again(
    fetcher: Fetcher, server: Server, damage: Callable[[bytes], bytes]
) -> None:
    server.answers = [damage]
    assert fetcher.submit(piece(2)).result(10).tobytes() == DATA[2 * SIZE : 3 * SIZE]
    assert fetcher.counts()["damaged"] == 1


def test_what_is_damaged_where_it_lies_is_an_error_that_says_where(
    fetcher: Fetcher, server: Server, cache: PieceCache
) -> None:
    server.tamper("shard", flipped(DATA))
    with pytest.raises(IntegrityError, match=r"shard, bytes 0 to 64: .*does not match its digest") as caught:
        fetcher.submit(piece(0)).result(10)
    assert "headway verify" in caught.value.next_step
    server.tamper("shard", DATA[:100])
    with pytest.raises(IntegrityError, match="ends after 36 of them"):
        fetcher.submit(piece(1)).result(10)
    assert cache.held_bytes() == 0


def test_a_damaged_file_on_the_node_is_not_used(fetcher: Fetcher, cache: PieceCache, tmp_path: Path) -> None:
    fetcher.submit(piece(0)).result(10)
    (kept,) = tmp_path.rglob("*.bin")
    kept.write_bytes(flipped(kept.read_bytes()))
    assert fetcher.submit(piece(0)).result(10).tobytes() == DATA[:SIZE]
    assert fetcher.counts()["fetched_pieces"] == 2


def test_a_disk_that_takes_nothing_more_ends_nothing(fetcher: Fetcher, cache: PieceCache) -> None:
    (cache.folder / piece(0).sha256[:2]).write_text("a file where the folder should be")
    assert fetcher.submit(piece(0)).result(10).tobytes() == DATA[:SIZE]


def test_a_program_that_ends_does_not_fetch_what_is_queued(tmp_path: Path) -> None:
    """All of them would be 1,200 requests: what comes is not what was asked for, and is asked for twice more."""
    program = f"from {__name__} import leave; leave({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < 200


def leave(folder: str) -> None:
    """Queue much, and come to the end of the program, which says how often the store was asked."""
    server = Server()
    atexit.register(lambda: print(server.num_asked))  # called when all threads have ended
    server.answers = [lambda data: threading.Event().wait(0.2) or data] * 400
    fetcher = Fetcher(server, PieceCache(Path(folder)), num_threads=4)
    for number in range(400):
        start = number % (len(DATA) - SIZE)
        digest = hashlib.sha256(f"{number}".encode()).hexdigest()  # of nothing that is there
        fetcher.submit(Piece(key="shard", start=start, num_bytes=SIZE, sha256=digest))


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, limit_bytes=10 * SIZE)
    parts = [bytes([number]) * SIZE for number in range(40)]
    names = [hashlib.sha256(part).hexdigest() for part in parts]
    first = cache.add(names[0], parts[0])
    for name, part in zip(names[1:], parts[1:], strict=True):
        cache.add(name, part)
        assert cache.open(names[1], SIZE) is not None  # used all the time
        assert cache.held_bytes() <= 10 * SIZE
    assert cache.open(names[39], SIZE) is not None
    assert cache.open(names[2], SIZE) is None
    assert first is not None
    assert first.tobytes() == parts[0]  # deleted, and still there for whoever had it mapped
    assert cache.num_evicted >= 29


def test_processes_of_a_node_fetch_a_piece_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    asked, hedged, start = context.Value("i", 0), context.Value("i", 0), context.Barrier(3)
    children = [context.Process(target=_fetch_all, args=(tmp_path, asked, hedged, start)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert 4 <= asked.value <= 4 + hedged.value


def _fetch_all(folder: Path, asked: Any, hedged: Any, start: threading.Barrier) -> None:
    server = Server()
    fetcher = Fetcher(server, PieceCache(folder), num_threads=2)
    start.wait(30)
    for number in range(4):
        assert fetcher.submit(piece(number)).result(10).tobytes() == DATA[number * SIZE : (number + 1) * SIZE]
    with asked.get_lock(), hedged.get_lock():
        hedged.value += fetcher.counts().get("hedged", 0)
        asked.value += server.num_asked
    fetcher.close()


@pytest.mark.parametrize(
    ("told", "size"), [("1024", 1024), ("2k", 2000), ("1.5Mi", 1572864), ("200Gi", 200 * 2**30), ("1T", 10**12)]
)
def test_a_limit_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, size: int) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, told)
    assert PieceCache(tmp_path).limit_bytes == size


@pytest.mark.parametrize("told", ["much", "-1", "0", "10 apples", "1e9", "200GiB"])
def test_a_limit_that_is_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, told)
    with pytest.raises(UsageError, match=f"{LIMIT_VARIABLE}.*is no size"):
        PieceCache(tmp_path)


@pytest.mark.parametrize("told", ["many", "0", "257"])
def test_threads_that_are_no_number(
    server: Server, cache: PieceCache, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, told)
    with pytest.raises(UsageError, match=THREADS_VARIABLE):
        Fetcher(server, cache)
