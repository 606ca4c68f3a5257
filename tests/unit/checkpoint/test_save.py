"""A save is a snapshot, is tried again, is told of when it fails, and never harms training."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import safetensors.torch
import torch

from orchestrator.checkpoint import commit
from orchestrator.checkpoint.catalog import committed, committed_steps
from orchestrator.checkpoint.format import KINDS
from orchestrator.checkpoint.save import UPLOAD_TRIES, CheckpointWriter, paced, writing
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import AttemptFailed, Fenced, StoreError, UsageError
from orchestrator.store import WorkerGroup, claim_group
from tests.unit.checkpoint.saving import (
    RUN,
    SHAPES,
    Buffers,
    bar_of,
    finish,
    frozen_values,
    leave,
    load,
    manifest_at,
    new_group,
    save,
    writer_of,
)
from tests.unit.checkpoint.states import FakeState, random_values, scalars
from tests.unit.fakes import MemoryStore


class Flaky(MemoryStore):
    """Fails the first ``num_failures`` uploads."""

    num_failures, num_uploads = 0, 0

    def upload(self, key: str, source: Any, *, max_concurrency: int | None = None, once: bool = False) -> None:
        self.num_uploads += 1
        if self.num_uploads <= self.num_failures:
            raise StoreError(f"down {self.num_uploads}")
        super().upload(key, source, max_concurrency=max_concurrency, once=once)


class Forgetful(MemoryStore):
    """Carries out the first publication of a rank, and loses the answer."""

    def __init__(self, bucket: str = "memory", prefix: str = "", *, client: Any = None) -> None:
        super().__init__(bucket, prefix, client=client)
        self.written: list[str] = []
        """Keys under a checkpoint, in the order in which they were written."""

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if "rank-" in key:
            self.written.append(key)
            if self.written.count(key) == 1:
                raise StoreError("the answer was lost")

    def _put(self, key: str, data: bytes | memoryview) -> None:
        self.written.append(key)
        super()._put(key, data)


@pytest.fixture
def group(memory_store: MemoryStore) -> WorkerGroup:
    return new_group(memory_store)


def filled_writer(store: MemoryStore, group: WorkerGroup, **options: Any) -> CheckpointWriter:
    state = FakeState(SHAPES)
    state.fill(random_values(SHAPES))
    return writer_of(store, group, state, retry_s=0.0, **options)


def test_the_files_are_what_safetensors_reads(memory_store: MemoryStore, group: WorkerGroup) -> None:
    values, frozen = random_values(SHAPES), frozen_values()
    save(memory_store, group, 4, values=values, frozen=frozen, world_size=1, module=Buffers(5))
    folder, manifest = manifest_at(memory_store, 4)
    read = safetensors.torch.load(memory_store.get(folder.prefix + manifest.files[0].key))
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(read[f"{kind}/{name}"], values[name][kind])
    assert torch.equal(read["frozen/emb"], frozen["emb"])
    assert torch.equal(read["buffer/count"], torch.tensor(5))


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("frozen_is_replicated", [True, False])
def test_many_ranks_make_one_checkpoint(
    memory_store: MemoryStore, group: WorkerGroup, world_size: int, frozen_is_replicated: bool
) -> None:
    """More ranks than some parameters have elements."""
    errors = save(
        memory_store, group, 4, world_size=world_size, frozen=frozen_values(), frozen_is_replicated=frozen_is_replicated
    )
    assert errors == [None] * world_size
    folder, manifest = manifest_at(memory_store, 4)
    assert verify(memory_store, folder).num_files == len(manifest.files) == world_size
    assert (manifest.attempt, manifest.group, manifest.nonce) == (1, 1, group.nonce)


def test_what_comes_before_a_commit_does(memory_store: MemoryStore, group: WorkerGroup) -> None:
    found: list[bool] = []
    state = FakeState(SHAPES, rank=0, world_size=1)
    look = lambda: found.append(bool(committed(memory_store, group.run_id)))  # noqa: E731
    writer = writer_of(memory_store, group, state, before_commit=look)
    writer.save(scalars(1))
    assert finish(writer).error is None
    assert found == [False]
    assert committed(memory_store, group.run_id)


def test_the_snapshot_does_not_see_what_comes_after(memory_store: MemoryStore, group: WorkerGroup) -> None:
    state = FakeState(SHAPES)
    state.fill(random_values(SHAPES))
    writer = writer_of(memory_store, group, state)
    writer.save(scalars(4))
    for f in state.fragments():
        f.tensors["fp32"].fill_(9.0)
    writer.close()
    loaded, _ = load(memory_store)
    assert torch.equal(loaded.fragments()[0].tensors["fp32"], random_values(SHAPES)["w"]["fp32"])


# -- failure


@pytest.mark.parametrize("num_failures", [1, UPLOAD_TRIES - 1])
def test_an_upload_is_tried_again(num_failures: int, caplog: pytest.LogCaptureFixture) -> None:
    store = Flaky(prefix="headway")
    store.num_failures = num_failures
    writer = filled_writer(store, new_group(store))
    writer.save(scalars(4))
    assert finish(writer).error is None
    assert committed_steps(store, RUN) == [4]
    assert caplog.text.count("Uploading rank 0's part of step 4 again: down") == num_failures


def test_what_was_uploaded_is_not_written_again_when_a_later_step_fails() -> None:
    """The answer to the publication may be lost, and rank 0 may have committed what it reads of it."""
    store = Forgetful(prefix="headway")
    writer = filled_writer(store, new_group(store), rank=1, world_size=2)
    writer.save(scalars(4))
    assert finish(writer).error is None
    names = [key.rpartition("/")[2] for key in store.written]
    assert names == ["rank-00001.safetensors", "rank-00001.index", "rank-00001.json", "rank-00001.json"]


def test_a_step_is_saved_once_by_a_group(memory_store: MemoryStore, group: WorkerGroup) -> None:
    """Else the second save would write other bytes under the manifest that the first one committed."""
    state = FakeState(SHAPES)
    writer = writer_of(memory_store, group, state)
    writer.save(scalars(8))
    writer.wait()
    before = memory_store.objects
    for tensor in (t for f in state.fragments() for t in f.tensors.values()):
        tensor.fill_(2.0)
    for step in (8, 4):
        with pytest.raises(UsageError, match=f"Step {step} is not above step 8"):
            writer.save(scalars(step))
    writer.close()
    assert memory_store.objects == before


def test_an_upload_that_keeps_failing_is_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    store = Flaky(prefix="headway")
    store.num_failures = UPLOAD_TRIES
    writer = filled_writer(store, new_group(store))
    assert writer.wait() is None
    writer.save(scalars(4))
    assert str(writer.wait().error) == f"down {UPLOAD_TRIES}"  # type: ignore[union-attr]
    assert store.num_uploads == UPLOAD_TRIES
    assert "The checkpoint of step 4 was not saved, training goes on: down" in caplog.text
    assert [saved.step for saved in writer.take_results()] == [4]
    writer.save(scalars(8))
    assert finish(writer).error is None
    assert (writer.counts.failed, writer.counts.committed, writer.counts.last_committed_step) == (1, 1, 8)


def test_closing_does_not_wait_for_another_try(memory_store: MemoryStore, group: WorkerGroup) -> None:
    writer = writer_of(memory_store, group, FakeState(SHAPES), retry_s=3600.0)
    memory_store.fail["upload"] = StoreError("down")
    writer.save(scalars(4))
    writer.close()
    assert str(writer.wait().error) == "down"  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [OSError("no space"), MemoryError("none"), RuntimeError("odd"), RecursionError("x")])
@pytest.mark.parametrize("calls", [("upload",), ("create",), ("upload", "create"), ("list",)])
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_a_save_fails_of_training_goes_on(
    memory_store: MemoryStore, group: WorkerGroup, error: Exception, calls: tuple[str, ...], rank: int
) -> None:
    writer = writer_of(memory_store, group, FakeState(SHAPES, rank=rank, world_size=2), rank=rank, world_size=1)
    for call in calls:
        memory_store.fail[call] = error
    writer.save(scalars(4))
    saved = finish(writer)
    if rank == 1 and calls == ("list",):
        assert saved.error is None, "only rank 0 lists"
        return
    assert isinstance(saved.error, AttemptFailed)
    assert f"Saving step 4 failed with {type(error).__name__}: {error}" in str(saved.error)
    assert writer.counts.failed == 1


@pytest.mark.parametrize("error", [StoreError("down"), OSError("odd"), MemoryError("none"), Fenced("late")])
@pytest.mark.parametrize("call", ["delete", "unfinished_uploads"])
def test_what_fails_after_the_commit_fails_no_save(
    memory_store: MemoryStore, group: WorkerGroup, caplog: pytest.LogCaptureFixture, error: Exception, call: str
) -> None:
    newer = claim_group(memory_store, group.attempt)
    leave(memory_store, group, 2)
    memory_store.fail[call] = error
    writer = filled_writer(memory_store, newer)
    writer.save(scalars(4))
    assert finish(writer).error is None
    assert (writer.counts.committed, writer.counts.failed) == (1, 0)
    assert "Step 4 is committed, but what it makes superfluous was not deleted" in caplog.text
    assert committed_steps(memory_store, RUN) == [4]


def test_rank_0_does_not_wait_in_a_folder_that_a_newer_group_barred(
    memory_store: MemoryStore, group: WorkerGroup
) -> None:
    """Its retention has deleted what the other rank had published."""
    memory_store.create(bar_of(leave(memory_store, group, 4)), b"")
    writer = writer_of(memory_store, group, FakeState(SHAPES, world_size=2), world_size=2)
    writer.save(scalars(4))
    error = finish(writer).error
    assert isinstance(error, Fenced)
    assert "step-00000004" in str(error)


def test_rank_0_does_not_wait_for_a_rank_that_failed(memory_store: MemoryStore, group: WorkerGroup) -> None:
    cut_off = memory_store.at(memory_store.bucket, memory_store.prefix)
    cut_off.fail["upload"] = StoreError("down")
    writers = [
        writer_of(store, group, FakeState(SHAPES, rank=rank, world_size=2), rank=rank, world_size=2, retry_s=0.0)
        for rank, store in enumerate((memory_store, cut_off))
    ]
    for writer in writers:
        writer.save(scalars(4))
    first, second = (finish(writer) for writer in writers)
    assert "ranks [1] could not upload their part" in str(first.error)
    assert str(second.error) == "down"
    assert committed_steps(memory_store, RUN) == []


@pytest.mark.parametrize("by", ["group", "attempt"])
def test_a_fenced_group_commits_nothing(memory_store: MemoryStore, group: WorkerGroup, by: str) -> None:
    save(memory_store, group, 4)
    if by == "group":
        claim_group(memory_store, group.attempt)
    else:
        new_group(memory_store)
    errors = save(memory_store, group, 8)
    assert isinstance(errors[0], Fenced)
    assert committed_steps(memory_store, RUN) == [4]


def test_a_damaged_step_gives_way_when_it_comes_again(memory_store: MemoryStore, group: WorkerGroup) -> None:
    save(memory_store, group, 4)
    folder, manifest = manifest_at(memory_store, 4)
    memory_store.tamper(folder.prefix + manifest.files[0].key, b"")
    values = random_values(SHAPES, seed=3)
    again = claim_group(memory_store, group.attempt)
    assert save(memory_store, again, 4, values=values) == [None, None]
    state, found = load(memory_store)
    assert found is not None
    assert found.manifest.nonce == again.nonce
    assert torch.equal(state.fragments()[0].tensors["fp32"], values["w"]["fp32"])


class Waits(threading.Event):
    """Tells how long it was waited on, without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked_s.append(timeout or 0.0)
        return self.is_set()


def test_an_upload_is_spread_evenly() -> None:
    hurry, pieces = Waits(), [memoryview(bytes(10)) for _ in range(4)]
    assert list(paced(pieces, over_s=1000.0, total=40, hurry=hurry)) == pieces
    assert hurry.asked_s == pytest.approx([0, 250, 500, 750], abs=10)


def test_an_upload_that_is_waited_for_hurries() -> None:
    hurry, pieces = threading.Event(), [memoryview(bytes(10)) for _ in range(4)]
    stream = paced(pieces, over_s=1e6, total=40, hurry=hurry)
    first = next(stream)
    hurry.set()
    assert [first, *stream] == pieces


def test_an_error_on_its_way_out_does_not_wait_for_other_ranks(
    memory_store: MemoryStore, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "ABANDON_S", 0.0)
    writer = writer_of(memory_store, group, FakeState(SHAPES, world_size=2), world_size=2)
    writer.save(scalars(4))
    with pytest.raises(KeyError), writing(writer):
        raise KeyError("rank 1 never comes")
    saved = writer.wait()
    assert saved is not None
    assert "ranks [1] did not finish" in str(saved.error)


def test_a_buffer_that_the_module_replaced_is_saved_as_it_is_now(memory_store: MemoryStore, group: WorkerGroup) -> None:
    module = Buffers(1)
    writer = writer_of(memory_store, group, FakeState(SHAPES), module=module)
    module.count = module.count + 41
    writer.save(scalars(4))
    assert finish(writer).error is None
    resumed = Buffers(0)
    load(memory_store, module=resumed)
    assert int(resumed.count) == int(module.count) == 42
