"""The store against a real S3 server."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound, StoreError
from orchestrator.store import Store, claim_attempt, open_store
from orchestrator.store.probe import require_conditional_writes
from orchestrator.store.s3 import PART_BYTES, PROMPT, new_client
from orchestrator.targets.ports import is_free
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.conftest import BUCKET

NUM_RACERS = 16


def race(work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` returned or raised in each of several threads that begin at once."""
    barrier = threading.Barrier(NUM_RACERS)

    def run(index: int) -> Any:
        barrier.wait()
        try:
            return work(index)
        except StoreError as e:
            return e

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        return list(pool.map(run, range(NUM_RACERS)))


@pytest.mark.parametrize("round_", range(5))
def test_one_of_many_creates_wins(store: Store, round_: int) -> None:
    results = race(lambda index: store.create("raced", b"writer %d" % index))
    winners = [index for index, result in enumerate(results) if result is None]
    assert len(winners) == 1
    assert store.get("raced") == b"writer %d" % winners[0]
    assert all(isinstance(result, AlreadyExists) for result in results if result is not None)


def test_a_create_whose_answer_was_lost_is_a_win(store: Store) -> None:
    store.create("mine", b"nonce 1")
    store.create("mine", b"nonce 1")  # the retry of a request that had arrived
    with pytest.raises(AlreadyExists):
        store.create("mine", b"nonce 2")


def test_numbers_are_claimed_without_gaps_or_duplicates(store: Store) -> None:
    def claim(index: int) -> int:
        return store.create_numbered(0, lambda number: f"claims/{number:05d}.json", {"nonce": str(index)})

    assert sorted(race(claim)) == list(range(1, NUM_RACERS + 1))


def test_attempts_race_for_their_numbers(store: Store) -> None:
    attempts = race(lambda index: claim_attempt(store, "run-1", facts={}))
    assert sorted(attempt.number for attempt in attempts) == list(range(1, NUM_RACERS + 1))


def test_ranges(store: Store) -> None:
    store.upload("data", b"0123456789")
    assert store.get_range("data", 2, 3) == b"234"
    assert store.get_range("data", 8, 100) == b"89"
    assert store.get_range("data", 4, 0) == b""


@pytest.mark.parametrize("size_bytes", [10, 20 * 2**20])
def test_an_object_that_was_written_over_is_not_read_as_the_one_that_was_listed(store: Store, size_bytes: int) -> None:
    data = secrets.token_bytes(size_bytes)  # the larger one goes up in parts, which give another kind of ETag
    store.upload("data", data)
    (listed,) = store.list("data")
    assert store.get_unchanged("data", listed.etag) == data
    assert store.get_unchanged("data", listed.etag, start=5, num_bytes=3) == data[5:8]
    assert store.get_unchanged("data", listed.etag, start=size_bytes + 1, num_bytes=3) == b""
    store.upload("data", secrets.token_bytes(size_bytes))
    for how in ({}, {"start": 5, "num_bytes": 3}):
        with pytest.raises(IntegrityError, match="data was written over"):
            store.get_unchanged("data", listed.etag, **how)


def test_a_large_file_goes_up_in_parts_and_comes_back(store: Store, tmp_path: Path) -> None:
    data = secrets.token_bytes(40 * 2**20)
    source = tmp_path / "source"
    source.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    store.upload("large/file", source)
    store.upload("large/bytes", data)
    for key in ("large/file", "large/bytes"):
        store.download(key, tmp_path / "back", sha256=digest)
        assert (tmp_path / "back").read_bytes() == data
    assert store.get_range("large/file", 20 * 2**20 - 5, 10) == data[20 * 2**20 - 5 : 20 * 2**20 + 5]


def test_memory_goes_up_without_a_copy_of_it_all(store: Store, tmp_path: Path) -> None:
    data = bytearray(secrets.token_bytes(6 * PART_BYTES))
    tracemalloc.start()
    try:
        store.upload("view", memoryview(data)[16:], max_concurrency=1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2.5 * PART_BYTES
    store.download("view", tmp_path / "view", sha256=hashlib.sha256(memoryview(data)[16:]).hexdigest())
    store.upload("small", memoryview(data)[:5])
    assert store.get("small") == data[:5]


def test_a_stream_goes_up_in_bounded_memory(store: Store, tmp_path: Path) -> None:
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes | memoryview]:
        for index in range(30):
            chunk = secrets.token_bytes(3 * 2**20 + index)
            digest.update(chunk)
            yield chunk if index % 2 else memoryview(chunk)

    tracemalloc.start()
    try:
        store.upload_stream("stream", chunks())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 * PART_BYTES + 2**23
    store.download("stream", tmp_path / "stream", sha256=digest.hexdigest())


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1])
def test_a_stream_of_any_length_comes_back(store: Store, num_bytes: int) -> None:
    data = secrets.token_bytes(num_bytes)
    store.upload_stream("stream", iter([data[:100], b"", memoryview(data)[100:]]))
    assert store.get("stream") == data


def test_a_source_that_is_gone_is_no_success_where_an_earlier_try_went_through(store: Store) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"first"
        yield store.get("gone")

    store.upload_stream("stream", [b"first", b"second"], once=True)
    with pytest.raises(NotFound, match="gone"):
        store.upload_stream("stream", chunks(), once=True)
    assert store.get("stream") == b"firstsecond"


def test_a_stream_that_fails_leaves_nothing_and_raises_its_own_error(store: Store) -> None:
    failure = NotFound("no such source")

    def chunks() -> Iterator[bytes]:
        yield secrets.token_bytes(PART_BYTES + 1)
        raise failure

    with pytest.raises(NotFound) as caught:
        store.upload_stream("stream", chunks())
    assert caught.value is failure
    assert not store.exists("stream")
    assert list(store.unfinished_uploads("")) == []


def test_unfinished_uploads_are_found_and_aborted(store: Store) -> None:
    keys = ["a/1", "a/2", "b/1"]
    client = new_client(PROMPT).api
    for key in keys:
        client.create_multipart_upload(Bucket=store.bucket, Key=store.prefix + key)
    assert sorted(upload.key for upload in store.unfinished_uploads("")) == keys
    found = sorted(store.unfinished_uploads("a/"), key=lambda upload: upload.key)
    assert [upload.key for upload in found] == ["a/1", "a/2"]
    assert all(abs(upload.started_s - time.time()) < 60 for upload in found)
    store.abort_upload(found[0])
    store.abort_upload(found[0])
    assert sorted(upload.key for upload in store.unfinished_uploads("")) == ["a/2", "b/1"]


def test_other_bytes_than_recorded_never_appear(store: Store, tmp_path: Path) -> None:
    store.upload("data", b"good")
    digest = hashlib.sha256(b"good").hexdigest()
    assert store.get_verified("data", sha256=digest, size_bytes=4) == b"good"
    store.upload("data", b"evil")
    with pytest.raises(IntegrityError, match="does not match"):
        store.download("data", tmp_path / "data", sha256=digest)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IntegrityError):
        store.get_verified("data", sha256=digest, size_bytes=4)


def test_listing_is_in_key_order_and_resumable(store: Store) -> None:
    keys = ["a/10", "a/2", "a/b/c", "a/é", "b/1"]
    for key in keys:
        store.upload(key, b"x")
    assert [item.key for item in store.list("a/")] == ["a/10", "a/2", "a/b/c", "a/é"]
    assert [item.key for item in store.list("a/", start_after="a/2")] == ["a/b/c", "a/é"]
    assert list(store.list_folders("")) == ["a", "b"]
    assert list(store.list_folders("a/")) == ["b"]


def test_deleting_and_missing_objects(store: Store, tmp_path: Path) -> None:
    store.upload("gone", b"x")
    assert store.exists("gone")
    store.delete(["gone", "never-was"])
    assert not store.exists("gone")
    for read in (
        lambda: store.get("gone"),
        lambda: store.get_range("gone", 0, 1),
        lambda: store.download("gone", tmp_path / "gone", sha256="0" * 64),
    ):
        with pytest.raises(NotFound):
            read()


def test_this_server_enforces_conditional_writes(store: Store) -> None:
    require_conditional_writes(store)
    assert list(store.list("probe/")) == []


@pytest.mark.parametrize(
    ("variable", "value", "next_step"),
    [("AWS_SECRET_ACCESS_KEY", "wrong", "AWS_SECRET_ACCESS_KEY"), ("AWS_ACCESS_KEY_ID", "WRONG", "AWS_ACCESS_KEY_ID")],
)
def test_a_wrong_key_says_what_to_check(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, next_step: str
) -> None:
    monkeypatch.setenv(variable, value)
    store = open_store(f"s3://{BUCKET}/x")
    for act in (lambda: store.get("key"), lambda: store.create("key", b""), lambda: list(store.list(""))):
        with pytest.raises(StoreError) as caught:
            act()
        assert type(caught.value) is StoreError
        assert next_step in caught.value.next_step


def test_a_missing_bucket_is_not_a_missing_object(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket-here/x")
    with pytest.raises(StoreError, match="no such bucket") as caught:
        list(store.list(""))
    assert "Create the bucket" in caught.value.next_step


def test_a_server_that_is_down_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = next(port for port in range(20000, 30000) if is_free(port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match=f"127.0.0.1:{port} cannot be reached") as caught:
        open_store(f"s3://{BUCKET}/x", patience=PROMPT).get("key")
    assert "AWS_ENDPOINT_URL" in caught.value.next_step
