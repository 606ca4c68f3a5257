"""Logs reach the store byte for byte, whatever rotates, is cut, dies or fails meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.pod.log_files import is_related, read_at, scan
from orchestrator.pod.ship_logs import Limits, LogShipper, keep_shipping, longest_wait_s, pause_s
from orchestrator.record.logs import LogReader, list_files
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

RUN, POD, SESSION = "run-1", "demo-head", "session_2026-01-01_00-00-00_000000_1"
DRIVER = "job-driver-demo-00001.log"
NOBODY = 65534
SMALL = Limits(chunk_bytes=100, read_bytes=40, file_bytes=150, num_files=4)


class Node:
    """Ray's folder in a pod, and a shipper beside it whose clock the test moves."""

    def __init__(self, store: MemoryStore, root: Path) -> None:
        self.store, self.root = store, root
        self.now = 0.0
        self.said: list[str] = []
        self.shipper = self.new_shipper()

    def new_shipper(self, limits: Limits | None = None) -> LogShipper:
        """A shipper that knows nothing: the first one, or one after a restart of its container."""
        self.shipper = LogShipper(
            self.store, RUN, root=self.root, pod=POD, say=self.said.append, limits=limits, clock=lambda: self.now
        )
        return self.shipper

    def path(self, name: str, session: str = SESSION) -> Path:
        path = self.root / session / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, data: bytes, session: str = SESSION) -> None:
        with self.path(name, session).open("ab") as file:
            file.write(data)

    def ship(self) -> None:
        self.shipper.ship(everything=True)

    def stored(self) -> dict[str, bytes]:
        """The bytes of each stored file by its name, of all sessions."""
        found: dict[str, bytes] = {}
        for file in list_files(self.store, RUN, f"{POD}/"):
            chunks = [self.store.get(file.chunk(RUN, n)) for n in range(1, file.num_chunks + 1)]
            assert all(chunks)
            found[file.name] = b"".join(chunks)
        return found

    def num_objects(self) -> int:
        return len(self.store.objects)


@pytest.fixture
def node(memory_store: MemoryStore, tmp_path: Path) -> Node:
    return Node(memory_store, tmp_path / "ray")


# -- which files


def test_logs_of_every_session_and_folder_are_stored_and_nothing_else(node: Node, tmp_path: Path) -> None:
    wanted = [DRIVER, "raylet.out", "raylet.err", "serve/replica_a#1.log", "events/event_GCS.log", "old/worker-1.out"]
    for name in wanted:
        node.write(name, name.encode())
    node.write("debug_state.txt", b"x")
    node.write("empty.log", b"")
    node.write("second.log", b"x", session="session_2")
    (tmp_path / "secret.log").write_text("secret")
    node.path("link.log").symlink_to(tmp_path / "secret.log")
    node.path("folder").symlink_to(tmp_path)
    (node.root / "session_latest").symlink_to(node.root / SESSION)
    os.mkfifo(node.path("pipe.log"))
    node.ship()
    expected = {name.replace("#", "_"): name.encode() for name in wanted} | {"second.log": b"x"}
    assert node.stored() == expected


def test_a_folder_that_ray_has_not_made_yet(node: Node) -> None:
    node.ship()
    assert node.stored() == {}


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_file_that_may_not_be_read_is_told_of_once_and_the_others_go_on(memory_store: MemoryStore) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to nobody
        Path(root).chmod(0o755)
        node = Node(memory_store, Path(root))
        for name in ("a.log", "b.log"):
            node.write(name, b"x")
        node.path("a.log").chmod(0)
        with without_privileges():
            node.ship()
            node.ship()
        assert node.stored() == {"b.log": b"x"}
        assert node.said == [f"{node.path('a.log')} cannot be read: Permission denied."]


def test_a_link_that_took_a_files_place_is_not_followed(node: Node, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    node.write("a.log", b"x")
    (found,) = scan(node.root)
    found.path.unlink()
    found.path.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        read_at(found, 0, 10)


def test_drivers_come_first_then_workers(node: Node) -> None:
    for name in ("dashboard.log", "worker-1.out", DRIVER):
        node.write(name, b"x")
    assert [file.name for file in scan(node.root)] == [DRIVER, "worker-1.out", "dashboard.log"]


def test_the_pods_name_is_one_part_of_a_key(memory_store: MemoryStore, node: Node) -> None:
    node.write("a.log", b"x")
    LogShipper(memory_store, RUN, root=node.root, pod="../a/b", say=print).ship(everything=True)
    assert list(memory_store.objects) == [f"{layout.logs(RUN)}.._a_b/{SESSION}/a.log/00001"]


# -- when


def test_little_text_waits_for_its_time_and_much_goes_at_once(node: Node) -> None:
    node.write("a.log", b"x")
    node.shipper.ship()
    node.now = 4.9
    node.shipper.ship()
    assert node.stored() == {}
    node.write("b.log", bytes(256 * 2**10))
    node.shipper.ship()
    assert node.stored() == {"b.log": bytes(256 * 2**10)}
    node.now = 5.1
    node.write("a.log", b"y")
    node.shipper.ship()
    assert node.stored()["a.log"] == b"xy"
    assert node.num_objects() == 2


def test_nothing_new_asks_nothing_of_the_store(node: Node) -> None:
    node.write("a.log", b"x")
    node.ship()
    for call in ("create", "list", "get", "get_range"):
        node.store.fail[call] = StoreError("asked")
    for _ in range(3):
        node.now += 100
        node.shipper.ship()


def test_the_longer_the_run_the_older_its_text_may_grow() -> None:
    assert [longest_wait_s(elapsed) for elapsed in (0, 500, 5500, 1e6)] == [5.0, 10.0, 60.0, 60.0]


def test_failures_make_the_pauses_longer_up_to_a_limit() -> None:
    assert [pause_s(n) for n in (0, 1, 2, 5, 1000)] == [1.0, 2.0, 4.0, 30.0, 30.0]


# -- growing, moving, being cut


def test_a_growing_file_is_stored_once_in_pieces_that_fit_in_memory(node: Node) -> None:
    node.new_shipper(Limits(read_bytes=40))
    data = os.urandom(1000)
    for start in range(0, 1000, 250):
        node.write("a.log", data[start : start + 250])
        node.ship()
    assert node.stored() == {"a.log": data}
    assert max(len(chunk) for chunk in node.store.objects.values()) == 40


@pytest.mark.parametrize("rotated", ["a.log.1", "a.1.log", "old/a.log"])
def test_a_rotated_file_goes_on_and_its_heir_is_another(node: Node, rotated: str) -> None:
    node.write("a.log", b"first ")
    node.ship()
    node.write("a.log", b"half, ")
    (node.root / SESSION / "logs" / "old").mkdir()
    node.path("a.log").rename(node.path(rotated))
    node.write(rotated, b"last words")
    node.write("a.log", b"anew")
    node.ship()
    assert node.stored() == {"a.log": b"first half, last words", "a.log~2": b"anew"}


def test_a_file_that_is_cut_begins_anew(node: Node) -> None:
    node.write("a.log", b"a long beginning")
    node.ship()
    os.truncate(node.path("a.log"), 0)
    node.ship()
    node.write("a.log", b"anew, and longer than before")
    node.ship()
    os.truncate(node.path("a.log"), 0)
    node.write("a.log", b"third")
    node.ship()
    expected = {"a.log": b"a long beginning", "a.log~2": b"anew, and longer than before", "a.log~3": b"third"}
    assert node.stored() == expected


def test_a_file_that_a_scan_missed_goes_on(node: Node) -> None:
    """One that is renamed between the listing of its folder and the look at its size."""
    node.write("a.log", b"one ")
    node.ship()
    node.path("a.log").rename(node.root / "elsewhere")
    node.write("a.log", b"an heir")
    node.ship()
    (node.root / "elsewhere").rename(node.path("a.log.1"))
    node.write("a.log.1", b"two")
    node.ship()
    assert node.stored() == {"a.log": b"one two", "a.log~2": b"an heir"}


def test_a_file_with_two_names_is_stored_once(node: Node) -> None:
    node.write("a.log", b"x")
    node.path("b.log").hardlink_to(node.path("a.log"))
    for text in (b"y", b"z"):
        node.ship()
        node.write("a.log", text)
    node.ship()
    assert list(node.stored().values()) == [b"xyz"]


def test_a_deleted_files_inode_may_belong_to_another_name(node: Node) -> None:
    """A file system gives a freed inode to the next file, which is then no rotation of the old one."""
    node.write("worker-a.out", b"abc")
    node.ship()
    node.path("worker-a.out").rename(node.path("worker-b.out"))
    node.write("worker-b.out", b"def")
    node.ship()
    assert node.stored() == {"worker-a.out": b"abc", "worker-b.out": b"abcdef"}


def test_names_of_one_file() -> None:
    assert is_related("raylet.out", "raylet.out.1")
    assert is_related("raylet.1.out", "old/raylet.out")
    assert not is_related("raylet.out", "raylet.err")
    assert not is_related("worker-a.out", "worker-b.out")


# -- restarts


def test_a_restart_goes_on_where_the_stored_chunks_end(node: Node) -> None:
    node.write("a.log", b"one ")
    node.write("serve/b.log", b"x")
    node.ship()
    node.write("a.log", b"two ")
    node.new_shipper()
    node.ship()
    node.new_shipper()
    node.write("a.log", b"three")
    node.ship()
    assert node.stored() == {"a.log": b"one two three", "serve/b.log": b"x"}
    assert node.num_objects() == 4


def test_a_restart_finds_files_that_rotated_meanwhile(node: Node) -> None:
    node.write("a.log", b"first ")
    node.ship()
    node.write("a.log", b"half")
    node.path("a.log").rename(node.path("a.log.1"))
    node.write("a.log", b"the heir, longer than that")
    node.new_shipper()
    node.ship()
    assert node.stored() == {"a.log": b"first half", "a.log~2": b"the heir, longer than that"}


def test_a_restart_finds_a_file_that_was_cut_meanwhile(node: Node) -> None:
    node.write("a.log", b"a beginning")
    node.ship()
    os.truncate(node.path("a.log"), 0)
    node.write("a.log", b"other text, and longer")
    node.new_shipper()
    node.ship()
    assert node.stored() == {"a.log": b"a beginning", "a.log~2": b"other text, and longer"}


def test_another_session_of_the_same_pod_is_apart(node: Node) -> None:
    node.write("a.log", b"one")
    node.ship()
    node.write("a.log", b"two", session="session_2")
    node.new_shipper()
    node.ship()
    sizes = {file.session: file.size_bytes for file in LogReader(node.store, RUN).files()}
    assert sizes == {SESSION: 3, "session_2": 3}


# -- limits


def test_a_file_is_stored_up_to_its_limit_which_it_says(node: Node) -> None:
    node.new_shipper(SMALL)
    node.write("a.log", b"x" * 149)
    node.ship()
    assert node.stored() == {"a.log": b"x" * 149}
    node.write("a.log", b"yz")
    for _ in range(2):
        node.ship()
        node.new_shipper(SMALL)
        node.write("a.log", b"more")
        node.ship()
    text = node.stored()["a.log"]
    assert text.startswith(b"x" * 149 + b"y\n[headway: this file's limit is reached")
    assert text.count(b"[headway:") == 1
    assert set(node.stored()) == {"a.log"}


def test_a_file_of_exactly_its_limit_is_whole(node: Node) -> None:
    node.new_shipper(SMALL)
    node.write("a.log", b"x" * 150)
    node.ship()
    assert node.stored() == {"a.log": b"x" * 150}


def test_files_above_the_limit_of_their_number_are_told_of_once(node: Node) -> None:
    node.new_shipper(SMALL)
    for n in range(6):
        node.write(f"{n}.log", b"x")
    node.write(DRIVER, b"x")
    node.ship()
    node.ship()
    assert set(node.stored()) == {DRIVER, "0.log", "1.log", "2.log"}
    assert node.said == ["4 files are stored; others of this pod are not."]


# -- errors

BROKEN = """
from orchestrator.pod.ship_logs import ship_logs

class Broken:
    def ship(self, *, everything):
        raise ZeroDivisionError("a bug")

ship_logs(Broken(), say=print)
"""


def test_a_bug_ends_the_program_so_that_it_is_started_again() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


class Refusing(MemoryStore):
    """Refuses to create what carries one of these words in its key."""

    def __init__(self, *words: str) -> None:
        super().__init__(prefix="headway")
        self.words, self.num_refused = words, 0

    def create(self, key: str, data: bytes) -> None:
        if any(word in key for word in self.words):
            self.num_refused += 1
            raise StoreError(f"refused: {key}")
        super().create(key, data)


def test_one_file_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    store = Refusing("a.log")
    node = Node(store, tmp_path)
    for name in ("a.log", "b.log", "c.log"):
        node.write(name, b"x")
    with pytest.raises(StoreError, match=r"refused: .*a\.log"):
        node.ship()
    assert set(node.stored()) == {"b.log", "c.log"}


def test_a_pass_ends_after_three_failures(tmp_path: Path) -> None:
    store = Refusing("log")
    node = Node(store, tmp_path)
    for n in range(10):
        node.write(f"{n}.log", b"x")
    with pytest.raises(StoreError):
        node.ship()
    assert store.num_refused == 3


class AnswersLost(MemoryStore):
    """Its creates arrive, and every other answer does not."""

    num_calls = 0

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        self.num_calls += 1
        if self.num_calls % 2:
            raise StoreError("no answer")


def test_lost_answers_neither_repeat_nor_lose_a_byte(tmp_path: Path) -> None:
    node = Node(AnswersLost(prefix="headway"), tmp_path)
    node.new_shipper(Limits(read_bytes=7))
    data = os.urandom(100)
    for start in range(0, 100, 10):
        node.write("a.log", data[start : start + 10])
        with suppress(StoreError):
            node.ship()
    for _ in range(20):  # each call stores at least one piece of what is left
        with suppress(StoreError):
            node.ship()
    assert node.stored() == {"a.log": data}


def test_a_store_that_is_down_ends_nothing_and_the_rest_is_stored_at_the_end(node: Node) -> None:
    told, trouble = threading.Event(), threading.Event()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        trouble.set()

    node.store.fail["list"] = StoreError("down")
    node.write("a.log", b"before ")
    worker = threading.Thread(target=keep_shipping, args=(node.shipper, told, say), daemon=True)
    worker.start()
    assert trouble.wait(30)
    assert said == ["Logs are not stored for now: down"]
    node.write("a.log", b"after")
    node.store.fail.clear()
    told.set()
    worker.join(30)
    assert not worker.is_alive()
    assert node.stored() == {"a.log": b"before after"}
    assert said[-1] == "Logs are stored again."
