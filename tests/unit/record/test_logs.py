"""Stored logs: chunks that are written once, and read in order, whole, and as they come."""

from __future__ import annotations

import pytest

from orchestrator.errors import StoreError
from orchestrator.record.logs import LOOK_S, LogFile, LogReader, LogWriter, base_name, clean, list_files, nth_name
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

RUN, JOB = "run-1", "demo-00001"
DRIVER = f"job-driver-{JOB}.log"


def writer(store: MemoryStore, name: str = DRIVER, *, pod: str = "head", session: str = "session_1") -> LogWriter:
    return LogWriter(store, RUN, LogFile(pod=pod, session=session, name=name))


def text(reader: LogReader, file: LogFile) -> str:
    return "".join(reader.read(file))


def test_chunks_are_numbered_under_pod_session_and_file(memory_store: MemoryStore) -> None:
    log = writer(memory_store, "serve/replica.log")
    log.append(b"one\n")
    log.append(b"two\n")
    prefix = "runs/run-1/logs/head/session_1/serve/replica.log/"
    assert memory_store.objects == {f"{prefix}00001": b"one\n", f"{prefix}00002": b"two\n"}
    (file,) = LogReader(memory_store, RUN).files()
    assert (file.pod, file.session, file.name) == ("head", "session_1", "serve/replica.log")
    assert (file.num_chunks, file.size_bytes, file.last_chunk_bytes) == (2, 8, 4)
    assert file.first_s <= file.modified_s
    assert text(LogReader(memory_store, RUN), file) == "one\ntwo\n"


def test_a_chunk_that_stands_is_taken_as_it_is(memory_store: MemoryStore) -> None:
    """A forerunner's request arrived after this writer had looked."""
    log, forerunner = writer(memory_store), writer(memory_store)
    forerunner.append(b"abc")
    log.append(b"abcdef")
    assert (log.file.num_chunks, log.file.size_bytes) == (1, 3)
    log.append(b"def")
    assert text(LogReader(memory_store, RUN), log.file) == "abcdef"


def test_an_error_leaves_the_writer_where_it_was(memory_store: MemoryStore) -> None:
    log = writer(memory_store)
    memory_store.fail["create"] = StoreError("down")
    with pytest.raises(StoreError, match="down"):
        log.append(b"abc")
    assert log.file.size_bytes == 0
    memory_store.fail.clear()
    log.append(b"abc")
    assert memory_store.get(log.file.chunk(RUN, 1)) == b"abc"


def test_samples_say_where_they_begin(memory_store: MemoryStore) -> None:
    log = writer(memory_store)
    log.append(b"0123")
    log.append(b"456789")
    assert log.sample(num_bytes=3) == (7, b"789")
    assert log.sample(num_bytes=100) == (4, b"456789")
    assert log.sample(num_bytes=3, at_start=True) == (0, b"012")


def test_files_of_several_pods_and_foreign_objects(memory_store: MemoryStore) -> None:
    for pod, name in (("head", "a.log"), ("head", "a.log~2"), ("head", "a.log.1"), ("worker", "a.log")):
        writer(memory_store, name, pod=pod).append(b"x")
    for foreign in ("notes.txt", "head/notes.txt", "head/session_1/00001", "head/session_1/a.log/part"):
        memory_store.create(layout.logs(RUN) + foreign, b"x")
    found = {(file.pod, file.name) for file in LogReader(memory_store, RUN).files()}
    assert found == {("head", "a.log"), ("head", "a.log~2"), ("head", "a.log.1"), ("worker", "a.log")}
    assert len(list_files(memory_store, RUN, "worker/")) == 1
    assert LogReader(memory_store, "run-10").files() == []


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_chunk_may_end_within_a_character(memory_store: MemoryStore, cut: int) -> None:
    data, log = "a€😀b".encode(), writer(memory_store)
    log.append(data[:cut])
    log.append(data[cut : cut + 3])
    log.append(data[cut + 3 :])
    assert text(LogReader(memory_store, RUN), log.file) == "a€😀b"


def test_what_is_not_utf8_is_replaced(memory_store: MemoryStore) -> None:
    log = writer(memory_store)
    log.append(b"a\xffb")
    log.append(b"c\xe2\x82")
    assert text(LogReader(memory_store, RUN), log.file) == "a\ufffdbc\ufffd"


def test_the_driver_logs_of_a_job_come_in_the_order_of_their_starts(memory_store: MemoryStore) -> None:
    places = [("head-z", "session_1", DRIVER), ("head-a", "session_2", DRIVER), ("head-a", "session_2", f"{DRIVER}~2")]
    for n, (pod, session, name) in enumerate(places):
        writer(memory_store, name, pod=pod, session=session).append(b"%d" % n)
    writer(memory_store, "job-driver-demo-00001.log.old.log").append(b"another job's")
    writer(memory_store, "job-driver-demo-000011.log").append(b"another job's")
    reader = LogReader(memory_store, RUN)
    assert [text(reader, file) for file in reader.driver_log(JOB)] == ["0", "1", "2"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_follower_gives_what_is_new_from_the_first_poll_on(memory_store: MemoryStore) -> None:
    clock, log = Clock(), writer(memory_store)
    follower = LogReader(memory_store, RUN).follow(JOB, clock=clock)
    assert list(follower.poll()) == []
    log.append(b"one\n\xe2\x82")
    assert list(follower.poll()) == ["one\n"]
    assert list(follower.poll()) == []
    log.append(b"\xactwo\n")
    log.append(b"three\n")
    assert list(follower.poll()) == ["€two\n", "three\n"]


def test_a_follower_sees_the_job_start_again_elsewhere(memory_store: MemoryStore) -> None:
    clock, first = Clock(), writer(memory_store)
    follower = LogReader(memory_store, RUN).follow(JOB, clock=clock)
    first.append(b"first\n")
    assert list(follower.poll()) == ["first\n"]
    writer(memory_store, pod="head-2").append(b"second\n")
    assert list(follower.poll()) == []
    clock.now += LOOK_S
    assert list(follower.poll()) == ["second\n"]


def test_finishing_looks_once_more_and_ends_what_was_never_finished(memory_store: MemoryStore) -> None:
    log = writer(memory_store)
    follower = LogReader(memory_store, RUN).follow(JOB, clock=Clock())
    log.append(b"one\n")
    assert list(follower.poll()) == ["one\n"]
    writer(memory_store, pod="head-2").append(b"two\xe2")
    assert "".join(follower.finish()) == "two\ufffd"


def test_names_are_made_safe_and_told_apart() -> None:
    assert clean("serve/replica_a#b:1~2 x.log") == "serve/replica_a_b_1_2_x.log"
    assert [nth_name("a.log", nth) for nth in (1, 2)] == ["a.log", "a.log~2"]
    assert base_name("serve/a.log~12") == base_name("serve/a.log") == "serve/a.log"
