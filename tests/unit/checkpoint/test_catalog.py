"""Which folders are committed checkpoints, and that each is the one its key says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import (
    MANIFEST,
    Folder,
    committed,
    committed_steps,
    find,
    folder_of,
    manifests,
    newest_to_commit,
    read_manifest,
    reread,
    stored,
)
from orchestrator.checkpoint.format import MAX_MANIFEST_BYTES, Manifest, seal
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.store import layout
from tests.unit.checkpoint.documents import document
from tests.unit.fakes import MemoryStore


def folder(step: int, *, attempt: int = 1, group: int = 1, nonce: str = "ab", run_id: str = "run-1") -> Folder:
    return Folder(run_id=run_id, step=step, attempt=attempt, group=group, nonce=nonce)


def commit(store: MemoryStore, place: Folder, data: bytes | None = None) -> Folder:
    """Put a manifest there: one that speaks of this very folder, or ``data``."""
    facts = {**document(place.step), "attempt": place.attempt, "group": place.group, "nonce": place.nonce}
    store.create(place.prefix + MANIFEST, seal({**facts, "run_id": place.run_id}) if data is None else data)
    return place


def test_only_what_has_a_manifest_is_committed(memory_store: MemoryStore) -> None:
    for step in (4, 100, 12):
        commit(memory_store, folder(step))
    root = layout.checkpoints("run-1")
    memory_store.create(folder(200).prefix + "rank-00000.json", b"{}")
    memory_store.create(folder(250).prefix + "deeper/manifest.json", b"{}")
    for stray in ("step-00000300/manifest.json", "step-x/1-1-a/manifest.json", "step-00000400/pins/manifest.json"):
        memory_store.create(root + stray, b"{}")
    commit(memory_store, folder(500, run_id="run-10"))
    assert committed_steps(memory_store, "run-1") == [100, 12, 4]
    manifest, digest = read_manifest(memory_store, folder(12))
    assert (manifest.state.step, len(digest)) == (12, 64)
    with pytest.raises(NotFound):
        read_manifest(memory_store, folder(200))


def test_an_empty_manifest_bars_a_folder(memory_store: MemoryStore) -> None:
    commit(memory_store, folder(4))
    commit(memory_store, folder(8), b"")
    assert committed_steps(memory_store, "run-1") == [4]
    barred, there = stored(memory_store, "run-1")
    assert (barred.is_abandoned, barred.is_committed) == (True, False)
    assert (there.is_abandoned, there.is_committed) == (False, True)
    with pytest.raises(NotFound, match="no committed checkpoint of step 8") as caught:
        find(memory_store, "run-1", 8)
    assert caught.value.next_step == "These steps have one: 4."


def test_of_one_step_the_newest_claim_comes_first(memory_store: MemoryStore) -> None:
    order = [
        folder(8, attempt=1), folder(4, attempt=10), folder(4, attempt=2, group=11), folder(4, attempt=2, group=3),
        folder(4, attempt=1, group=99),
    ]  # fmt: skip
    for place in sorted(order, key=lambda f: f.prefix):
        commit(memory_store, place)
    assert committed(memory_store, "run-1") == order
    assert committed_steps(memory_store, "run-1") == [8, 4]
    assert find(memory_store, "run-1", 4) == order[1]


def test_the_newest_attempt_that_committed_may_not_have_the_newest_step(memory_store: MemoryStore) -> None:
    assert newest_to_commit(memory_store, "run-1") == 0
    commit(memory_store, folder(8, attempt=1))
    commit(memory_store, folder(4, attempt=10))
    memory_store.create(folder(9, attempt=11).prefix + "rank-00000.json", b"{}")
    assert newest_to_commit(memory_store, "run-1") == 10


def test_numbers_beyond_their_width_are_in_order(memory_store: MemoryStore) -> None:
    places = [folder(123_456_789), folder(99_999_999), folder(4, attempt=123_456), folder(4, attempt=99_999)]
    for place in places:
        commit(memory_store, place)
    assert committed(memory_store, "run-1") == places


@pytest.mark.parametrize(
    "key", ["step-4/00001-00001-ab/x", "step-00000004/1-1-ab/x", "step-0000000٤/00001-00001-ab/x", "x/y", ""]
)
def test_only_the_key_that_headway_writes_is_a_folders(key: str) -> None:
    assert folder_of("run-1", layout.checkpoints("run-1") + key) is None


def test_a_folders_key_gives_the_folder_back() -> None:
    place = folder(7, attempt=2, group=3)
    assert folder_of("run-1", place.prefix + "a/b") == (place, "a/b")
    assert folder_of("run-2", place.prefix + "a/b") is None


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[]", b"null", b"{}", b"[" * 100_000, seal({}), seal({"a": 1})])
def test_what_is_no_manifest_is_refused(memory_store: MemoryStore, data: bytes) -> None:
    commit(memory_store, folder(4), data)
    with pytest.raises(IntegrityError, match=r"step-00000004/00001-00001-ab/manifest\.json is "):
        read_manifest(memory_store, folder(4))


@pytest.mark.parametrize(
    "place",
    [
        folder(8),
        folder(4, attempt=2),
        folder(4, group=2),
        folder(4, nonce="ba"),
        folder(4, run_id="run-2"),
    ],
    ids=["step", "attempt", "group", "nonce", "run"],
)
def test_a_manifest_in_another_place_is_refused(memory_store: MemoryStore, place: Folder) -> None:
    commit(memory_store, place, seal(document(4)))
    with pytest.raises(IntegrityError, match="is the manifest of another checkpoint: step 4 of run-1"):
        read_manifest(memory_store, place)


def test_a_manifest_that_is_too_large_is_not_read_whole() -> None:
    class Huge(MemoryStore):
        """Holds more than it can have, and hands out what was asked for."""

        def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
            asked.append(num_bytes)
            return bytes(num_bytes)

    asked: list[int] = []
    with pytest.raises(IntegrityError, match="no manifest is"):
        read_manifest(Huge(), folder(4))
    assert set(asked) == {MAX_MANIFEST_BYTES + 1}


def test_what_the_wire_damaged_is_read_again() -> None:
    answers: Iterator[Any] = iter([IntegrityError("one"), IntegrityError("two"), 3])

    def read() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert reread(read) == 3


def test_what_is_damaged_each_time_is_refused_and_what_is_missing_is_asked_for_once() -> None:
    calls: list[str] = []

    def read(error: Exception) -> Any:
        calls.append(str(error))
        raise error

    with pytest.raises(IntegrityError):
        reread(lambda: read(IntegrityError("damaged")))
    with pytest.raises(NotFound):
        reread(lambda: read(NotFound("gone")))
    assert calls == ["damaged"] * 3 + ["gone"]


def test_the_list_goes_on_past_what_is_damaged(memory_store: MemoryStore) -> None:
    commit(memory_store, folder(4))
    commit(memory_store, folder(8), b"{}")
    (first, fault), (second, manifest) = manifests(memory_store, "run-1")
    assert (first.step, second.step) == (8, 4)
    assert isinstance(fault, IntegrityError)
    assert isinstance(manifest, Manifest)


def test_the_list_goes_on_past_what_retention_deletes_meanwhile(memory_store: MemoryStore) -> None:
    commit(memory_store, folder(4))
    commit(memory_store, folder(8))
    listing = manifests(memory_store, "run-1")
    assert next(listing)[0].step == 8
    memory_store.delete([folder(4).prefix + MANIFEST])
    assert list(listing) == []
