"""What stays of a run's checkpoints, what goes, and in which order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from orchestrator.checkpoint import retention
from orchestrator.checkpoint.catalog import MANIFEST, Folder, committed, committed_steps, find
from orchestrator.checkpoint.retention import abort_unfinished_uploads, pin, pinned, retire, unpin
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import Fenced, StoreError
from orchestrator.store import WorkerGroup, claim_group, layout
from tests.unit.checkpoint.saving import RUN, bar_of, leave, new_group, save
from tests.unit.fakes import MemoryStore


class Watched(MemoryStore):
    """Remembers what is created and deleted, in order; may do something just before a bar is put up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[str, str]] = []
        self.before_bar: Any = None

    def create(self, key: str, data: bytes) -> None:
        if not data and self.before_bar:
            self.before_bar()
        super().create(key, data)
        self.calls.append(("create", key))

    def delete(self, keys: Any) -> None:
        batch = list(keys)
        super().delete(batch)
        self.calls += [("delete", key) for key in batch]


@pytest.fixture
def store() -> Watched:
    return Watched(prefix="headway")


@pytest.fixture
def group(store: Watched) -> WorkerGroup:
    return new_group(store)


def fill(store: MemoryStore, group: WorkerGroup, *steps: int, keep: int = 99) -> None:
    for step in steps:
        assert save(store, group, step, keep=keep, world_size=1) == [None]


def retire_after(store: MemoryStore, group: WorkerGroup, step: int, *, keep: int) -> None:
    retire(store, group, keep=keep, just_committed=find(store, RUN, step))


def folders(store: MemoryStore) -> set[str]:
    """Steps that have anything but pins."""
    root = layout.checkpoints(RUN)
    return {key[len(root) :].split("/")[0] for key in store.objects if key.startswith(root) and "/pins/" not in key}


def age(store: MemoryStore, key: str, by_s: float) -> None:
    """Make an object older by the server's clock."""
    held = store._connection.held
    data, modified_s = held[(store.bucket, store.prefix + key)]
    held[(store.bucket, store.prefix + key)] = (data, modified_s - by_s)


def test_the_newest_are_kept_and_a_manifest_goes_first(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 2, 4, 6, 8)
    going = [find(store, RUN, step) for step in (4, 2)]
    store.calls.clear()
    retire_after(store, group, 8, keep=2)
    assert committed_steps(store, RUN) == [8, 6]
    assert folders(store) == {"step-00000006", "step-00000008"}
    for folder in going:
        calls = [call for call in store.calls if call[1].startswith(folder.prefix)]
        assert calls[0] == ("delete", folder.prefix + MANIFEST)
        assert len(calls) == 4
    for folder in committed(store, RUN):
        verify(store, folder)


def test_a_folder_that_was_half_deleted_is_barred_and_swept(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 2, 4)
    half = find(store, RUN, 2)
    store.delete([half.prefix + MANIFEST])
    retire_after(store, group, 4, keep=1)
    assert [key for key in store.objects if key.startswith(half.prefix)] == [bar_of(half)]


# -- pins


def test_a_pinned_step_stays_until_it_is_unpinned(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 2, 4, 6)
    pin(store, RUN, 2, "export", reason="a version")
    pin(store, RUN, 2, "export", reason="again")
    retire_after(store, group, 6, keep=1)
    assert committed_steps(store, RUN) == [6, 2]
    unpin(store, RUN, 2, "export")
    retire_after(store, group, 6, keep=1)
    assert committed_steps(store, RUN) == [6]


@pytest.mark.parametrize(("age_s", "steps"), [(99.0, [4, 2]), (101.0, [4])])
def test_a_pin_for_a_time_ends_by_the_servers_clock(
    store: Watched, group: WorkerGroup, age_s: float, steps: list[int]
) -> None:
    fill(store, group, 2)
    pin(store, RUN, 2, "reader", reason="reads", for_s=100.0)
    fill(store, group, 4)
    age(store, layout.checkpoint_pins(RUN, 2) + "reader.json", age_s)
    retire_after(store, group, 4, keep=1)
    assert committed_steps(store, RUN) == steps


def test_only_the_servers_times_count(store: Watched, group: WorkerGroup) -> None:
    """Pin and manifest from a server that is a year behind: the pin is as young as it was."""
    fill(store, group, 2)
    pin(store, RUN, 2, "reader", reason="reads", for_s=100.0)
    fill(store, group, 4)
    year_s = 365 * 24 * 3600.0
    age(store, layout.checkpoint_pins(RUN, 2) + "reader.json", year_s)
    age(store, bar_of(find(store, RUN, 4)), year_s)
    retire_after(store, group, 4, keep=1)
    assert committed_steps(store, RUN) == [4, 2]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"3", b'{"for_s":"long"}', b"[" * 100_000])
def test_a_pin_that_nobody_can_read_holds(store: Watched, group: WorkerGroup, data: bytes) -> None:
    fill(store, group, 2, 4)
    store.upload(layout.checkpoint_pins(RUN, 2) + "odd.json", data)
    retire_after(store, group, 4, keep=1)
    assert committed_steps(store, RUN) == [4, 2]


def test_what_only_looks_like_a_pin_is_none(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 2, 4)
    for name in ("step-²/pins/a.json", "step-x/pins/a.json", "pins/a.json"):
        store.upload(layout.checkpoints(RUN) + name, b"{}")
    retire_after(store, group, 4, keep=1)
    assert committed_steps(store, RUN) == [4]


def test_a_reader_pins_while_it_reads_and_an_error_does_not_leave_the_pin(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 2)
    folder = find(store, RUN, 2)

    def pins() -> list[str]:
        return [key for key in store.objects if "/pins/" in key]

    def read() -> None:
        with pinned(store, folder, reason="a test reads"):
            (key,) = pins()
            assert store.get_json(key) == {"reason": "a test reads", "for_s": retention.READER_S}
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        read()
    assert pins() == []


@pytest.mark.parametrize("call", ["create", "delete"])
def test_a_reader_without_the_right_to_write_reads(store: Watched, group: WorkerGroup, call: str) -> None:
    fill(store, group, 2)
    store.fail[call] = StoreError("Access denied")
    with pinned(store, find(store, RUN, 2), reason="a test reads"):
        was_read = True
    assert was_read


# -- others' folders


def test_of_the_step_just_committed_only_the_newest_claim_stays(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 4)
    again = claim_group(store, group.attempt)
    fill(store, again, 4)
    assert [folder.group for folder in committed(store, RUN)] == [2]


def test_a_pin_holds_the_older_one_of_a_step_that_is_committed_again(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 4)
    older = find(store, RUN, 4)
    with pinned(store, older, reason="a test reads"):
        again = claim_group(store, group.attempt)
        fill(store, again, 4)
        verify(store, older)
    retire_after(store, again, 4, keep=99)
    assert [folder.group for folder in committed(store, RUN)] == [2]


def test_leftovers_are_barred_before_any_file_goes(store: Watched, group: WorkerGroup) -> None:
    newer = claim_group(store, group.attempt)
    gone = [leave(store, group, step) for step in (2, 4, 8)] + [leave(store, newer, 2)]
    fill(store, newer, 4)
    for folder in gone:
        calls = [call for call in store.calls if call[1].startswith(folder.prefix)]
        assert calls == [("create", bar_of(folder)), ("delete", folder.prefix + "rank-00000.safetensors")]
        assert store.objects[bar_of(folder)] == b""
    assert committed_steps(store, RUN) == [4]
    before = store.objects
    retire_after(store, newer, 4, keep=1)
    assert store.objects == before, "a bar stays, and is not put up again"


def test_a_barred_folder_cannot_be_committed(store: Watched, group: WorkerGroup) -> None:
    newer = claim_group(store, group.attempt)
    folder = leave(store, group, 4)
    fill(store, newer, 4)
    with pytest.raises(StoreError, match="exists already"):
        store.create(bar_of(folder), b"{}")
    assert committed_steps(store, RUN) == [4]


def test_a_folder_that_is_committed_at_the_last_moment_is_left_alone(store: Watched, group: WorkerGroup) -> None:
    newer = claim_group(store, group.attempt)
    folder = leave(store, group, 2)
    store.before_bar = lambda: store.tamper(bar_of(folder), b"{manifest}")
    fill(store, newer, 4)
    assert store.objects[bar_of(folder)] == b"{manifest}"
    assert store.objects[folder.prefix + "rank-00000.safetensors"] == b"x"


def test_what_newer_ones_wrote_and_what_is_under_way_stays(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 4)
    later_group = dataclasses.replace(group, number=2, nonce="cc")
    later_attempt = dataclasses.replace(group, attempt=dataclasses.replace(group.attempt, number=2), nonce="dd")
    stay = [leave(store, other, step) for other in (later_group, later_attempt) for step in (2, 4, 8)]
    stay += [leave(store, group, 8)]
    before = store.objects
    retire_after(store, group, 4, keep=1)
    assert store.objects == before
    assert len(stay) == 7


def test_the_step_just_committed_stays_below_a_newer_one(store: Watched, group: WorkerGroup) -> None:
    fill(store, group, 8)
    fill(store, group, 4, keep=1)
    assert committed_steps(store, RUN) == [8, 4]
    verify(store, find(store, RUN, 4))


@pytest.mark.parametrize("by", ["group", "attempt"])
def test_a_fenced_group_deletes_nothing(store: Watched, group: WorkerGroup, by: str) -> None:
    fill(store, group, 2, 4)
    leave(store, group, 3)
    if by == "group":
        claim_group(store, group.attempt)
    else:
        new_group(store)
    before = store.objects
    with pytest.raises(Fenced):
        retire_after(store, group, 4, keep=1)
    assert store.objects == before


def test_unfinished_uploads_of_older_groups_are_aborted_and_no_others(store: Watched, group: WorkerGroup) -> None:
    own = claim_group(store, group.attempt)

    def begin(attempt: int, number: int, run_id: str = RUN) -> str:
        folder = Folder(run_id=run_id, step=4, attempt=attempt, group=number, nonce="ab")
        return store.leave_unfinished(folder.prefix + "rank-00000.safetensors", started_s=0.0).upload_id

    begin(1, 1)
    stay = {begin(1, 2), begin(1, 3), begin(2, 1), begin(1, 1, run_id="run-10")}
    stay.add(store.leave_unfinished(layout.checkpoints(RUN) + "elsewhere", started_s=0.0).upload_id)
    assert abort_unfinished_uploads(store, own) == 1
    assert {upload.upload_id for upload in store.unfinished_uploads("")} == stay


def test_damaged_steps_ahead_take_no_place_of_good_ones(memory_store: MemoryStore) -> None:
    group = new_group(memory_store)
    for step in (50, 80, 90, 100):
        save(memory_store, group, step, keep=9)
    newer = claim_group(memory_store, group.attempt)  # resumed from 50, since all after it are damaged
    save(memory_store, newer, 60, keep=3)
    assert committed_steps(memory_store, RUN) == [100, 90, 80, 60, 50]
