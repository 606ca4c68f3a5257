"""Saving and resuming against a store in memory: every cut to every other, damage, fencing and retention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orchestrator.checkpoint import resume
from orchestrator.checkpoint.catalog import committed_steps, read_manifest
from orchestrator.checkpoint.format import KINDS
from orchestrator.checkpoint.resume import READ_BYTES, CheckpointReader, Piece, resume_newest
from orchestrator.checkpoint.save import CheckpointWriter, assemble, remove_old
from orchestrator.checkpoint.tensors import persistent_buffers
from orchestrator.errors import Fenced, IntegrityError, RunError, StoreError
from orchestrator.store import Attempt, claim_attempt, layout
from tests.unit.checkpoint.states import FakeState, random_values, scalars
from tests.unit.fakes import MemoryStore

SHAPES: dict[str, tuple[int, ...]] = {"w": (7, 5), "bias": (3,), "scale": ()}


class Buffers(nn.Module):
    """Persistent buffers of odd sizes and several dtypes, and one that is not persistent."""

    def __init__(self, fill: int = 0) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3,), bool(fill)))
        self.register_buffer("count", torch.tensor(fill, dtype=torch.int64))
        self.register_buffer("mean", torch.full((3,), float(fill)))
        self.register_buffer("cache", torch.full((4,), float(fill)), persistent=False)
        self.inner = nn.BatchNorm1d(3, affine=False)


def save(
    store: MemoryStore,
    attempt: Attempt,
    step: int,
    *,
    values: dict[str, Any] | None = None,
    world_size: int = 2,
    keep: int = 3,
    nonce: str = "aabbccdd",
    module: nn.Module | None = None,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> list[Exception | None]:
    """Save one checkpoint by ``world_size`` ranks; each rank's error."""
    writers = []
    for rank in range(world_size):
        state = FakeState(shapes, rank=rank, world_size=world_size)
        state.fill(values or random_values(shapes))
        writers.append(
            CheckpointWriter(
                store, attempt, state, module or nn.Module(),  # type: ignore[arg-type]
                rank=rank, world_size=world_size, group_nonce=nonce, keep=keep,
            )
        )  # fmt: skip
    for writer in writers:
        writer.save(scalars(step))
    errors = [saved.error if (saved := writer.wait()) else None for writer in writers]
    for writer in writers:
        writer.close()
    return list(errors)


def load(
    store: MemoryStore, run_id: str, *, rank: int, world_size: int, module: nn.Module | None = None
) -> tuple[FakeState, Any]:
    state = FakeState(SHAPES, rank=rank, world_size=world_size)
    return state, resume_newest(store, run_id, state, module or nn.Module(), rank=0)  # type: ignore[arg-type]


def flip(store: MemoryStore, key: str, position: int = -1) -> None:
    data = bytearray(store.get(key))
    data[position] ^= 1
    store.tamper(key, bytes(data))


@pytest.fixture
def attempt(memory_store: MemoryStore) -> Attempt:
    return claim_attempt(memory_store, "run-1", facts={})


# -- there and back


@pytest.mark.parametrize("written_by", [1, 2, 3, 5])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_any_cut_resumes_at_any_other(
    memory_store: MemoryStore, attempt: Attempt, written_by: int, read_by: int
) -> None:
    values = random_values(SHAPES)
    assert (
        save(memory_store, attempt, 4, values=values, world_size=written_by, module=Buffers(5)) == [None] * written_by
    )
    for rank in range(read_by):
        module = Buffers()
        state, manifest = load(memory_store, "run-1", rank=rank, world_size=read_by, module=module)
        expected = FakeState(SHAPES, rank=rank, world_size=read_by)
        expected.fill(values)
        for found, wanted in zip(state.fragments(), expected.fragments(), strict=True):
            assert all(torch.equal(found.tensors[kind], wanted.tensors[kind]) for kind in KINDS)
        assert (manifest.state.step, state.optimizer_step, state.num_refreshed) == (4, 4, 1)
        for name, buffer in persistent_buffers(module).items():
            assert torch.equal(buffer, persistent_buffers(Buffers(5))[name])
        assert torch.equal(module.cache, torch.zeros(4))


def test_the_files_are_what_safetensors_reads(memory_store: MemoryStore, attempt: Attempt) -> None:
    import safetensors.torch

    values = random_values(SHAPES)
    save(memory_store, attempt, 4, values=values, world_size=1, module=Buffers(5))
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    read = safetensors.torch.load(memory_store.get(layout.checkpoint("run-1", 4) + manifest.files[0].key))
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(read[f"{kind}/{name}"], values[name][kind])
    assert torch.equal(read["buffer/count"], torch.tensor(5))


def test_without_a_checkpoint_there_is_nothing_to_resume(memory_store: MemoryStore, attempt: Attempt) -> None:
    state, manifest = load(memory_store, "run-1", rank=0, world_size=1)
    assert manifest is None
    assert state.num_refreshed == 0


def test_another_models_checkpoint_is_refused(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 4, shapes={**SHAPES, "w": (5, 7)})
    with pytest.raises(RunError, match=r"holds w as \(5, 7\), the model has it as \(7, 5\)"):
        load(memory_store, "run-1", rank=0, world_size=1)
    save(memory_store, attempt, 8)
    with pytest.raises(RunError, match="no matching buffer"):
        load(memory_store, "run-1", rank=0, world_size=1, module=Buffers())


def test_the_snapshot_does_not_see_what_comes_after(memory_store: MemoryStore, attempt: Attempt) -> None:
    state = FakeState(SHAPES)
    state.fill(random_values(SHAPES))
    writer = CheckpointWriter(
        memory_store, attempt, state, nn.Module(), rank=0, world_size=1, group_nonce="ab", keep=3  # type: ignore[arg-type]
    )  # fmt: skip
    writer.save(scalars(4))
    for f in state.fragments():
        f.tensors["fp32"].fill_(9.0)
    writer.close()
    loaded, _ = load(memory_store, "run-1", rank=0, world_size=1)
    assert torch.equal(loaded.fragments()[0].tensors["fp32"], random_values(SHAPES)["w"]["fp32"])


# -- damage


def test_the_one_before_is_taken_and_the_part_named(
    memory_store: MemoryStore, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = random_values(SHAPES, seed=1), random_values(SHAPES, seed=2)
    save(memory_store, attempt, 4, values=older)
    save(memory_store, attempt, 8, values=newer)
    manifest, _ = read_manifest(memory_store, "run-1", 8)
    flip(memory_store, layout.checkpoint("run-1", 8) + manifest.files[1].key)
    state, found = load(memory_store, "run-1", rank=0, world_size=1)
    assert found.state.step == 4
    assert torch.equal(state.fragments()[0].tensors["fp32"], older["w"]["fp32"])
    assert state.num_refreshed == 1
    assert "The checkpoint of step 8 cannot be used, trying the one before: s3://memory/headway/" in caplog.text
    assert f"{manifest.files[1].key}: block 0 " in caplog.text


@pytest.mark.parametrize("part", ["manifest", "index", "size", "missing"])
def test_every_part_is_checked(
    memory_store: MemoryStore, attempt: Attempt, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    save(memory_store, attempt, 4)
    save(memory_store, attempt, 8)
    manifest, _ = read_manifest(memory_store, "run-1", 8)
    folder, file = layout.checkpoint("run-1", 8), manifest.files[1]
    if part == "manifest":
        memory_store.tamper(f"{folder}manifest.json", b"{}")
    elif part == "index":
        flip(memory_store, folder + file.index_key)
    elif part == "size":
        memory_store.tamper(folder + file.key, memory_store.get(folder + file.key)[:-1])
    else:
        memory_store.delete([folder + file.key])
    _, found = load(memory_store, "run-1", rank=0, world_size=1)
    assert found.state.step == 4
    named = {"manifest": "manifest.json", "index": file.index_key}.get(part, file.key)
    assert named in caplog.text


def test_all_damaged_is_no_fresh_start(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 4)
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    flip(memory_store, layout.checkpoint("run-1", 4) + manifest.files[0].key)
    with pytest.raises(IntegrityError, match="None of the checkpoints committed for run-1 can be used") as caught:
        load(memory_store, "run-1", rank=0, world_size=1)
    assert "s3://memory/headway/runs/run-1/checkpoints/" in caught.value.next_step


def test_a_step_that_was_committed_before_stays(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 4, nonce="aa")
    before = memory_store.get(layout.checkpoint_manifest("run-1", 4))
    assert save(memory_store, attempt, 4, nonce="bb") == [None, None]
    assert memory_store.get(layout.checkpoint_manifest("run-1", 4)) == before


def test_a_damaged_step_gives_way_when_it_comes_again(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 4, nonce="aa")
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    flip(memory_store, layout.checkpoint("run-1", 4) + manifest.files[0].key)
    values = random_values(SHAPES, seed=3)
    assert save(memory_store, attempt, 4, nonce="bb", values=values) == [None, None]
    state, found = load(memory_store, "run-1", rank=0, world_size=1)
    assert found.nonce == "bb"
    assert torch.equal(state.fragments()[0].tensors["fp32"], values["w"]["fp32"])


# -- fencing and failure


def test_a_fenced_attempt_commits_nothing(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 4)
    claim_attempt(memory_store, "run-1", facts={})
    errors = save(memory_store, attempt, 8)
    assert isinstance(errors[0], Fenced)
    assert committed_steps(memory_store, "run-1") == [4]


def test_a_failed_save_is_told_and_the_next_one_works(memory_store: MemoryStore, attempt: Attempt) -> None:
    state = FakeState(SHAPES)
    writer = CheckpointWriter(
        memory_store, attempt, state, nn.Module(), rank=0, world_size=1, group_nonce="ab", keep=3  # type: ignore[arg-type]
    )  # fmt: skip
    assert writer.wait() is None
    memory_store.fail["upload"] = StoreError("down")
    writer.save(scalars(4))
    assert str(writer.wait().error) == "down"  # type: ignore[union-attr]
    assert [str(saved.error) for saved in writer.take_results()] == ["down"]
    assert str(writer.wait().error) == "down", "it is still the last save when its result was taken"  # type: ignore[union-attr]
    del memory_store.fail["upload"]
    writer.save(scalars(8))
    assert writer.wait().error is None  # type: ignore[union-attr]
    assert (writer.counts.failed, writer.counts.committed, writer.counts.last_committed_step) == (1, 1, 8)
    writer.close()


def test_rank_0_does_not_wait_for_a_rank_that_failed(memory_store: MemoryStore, attempt: Attempt) -> None:
    cut_off = memory_store.at(memory_store.bucket, memory_store.prefix)
    cut_off.fail["upload"] = StoreError("down")
    writers = [
        CheckpointWriter(
            store, attempt, FakeState(SHAPES, rank=rank, world_size=2), nn.Module(),  # type: ignore[arg-type]
            rank=rank, world_size=2, group_nonce="ab", keep=3,
        )
        for rank, store in enumerate((memory_store, cut_off))
    ]  # fmt: skip
    for writer in writers:
        writer.save(scalars(4))
    first, second = (writer.wait() for writer in writers)
    assert "ranks [1] could not upload their part" in str(first.error)  # type: ignore[union-attr]
    assert str(second.error) == "down"  # type: ignore[union-attr]
    assert committed_steps(memory_store, "run-1") == []
    for writer in writers:
        writer.close()


# -- reads


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5 * READ_BYTES), st.integers(0, 3 * READ_BYTES)),
        min_size=1,
        max_size=12,
    )
)
def test_coalesced_reads_cover_every_byte_within_the_limit(spans: list[tuple[int, int, int]]) -> None:
    room = torch.empty(3 * READ_BYTES, dtype=torch.uint8)
    pieces = [Piece(file=file, start=start, target=room[:length]) for file, start, length in spans]
    groups = list(resume._coalesce(pieces))
    for group in groups:
        assert len({piece.file for piece in group}) == 1
        assert max(piece.stop for piece in group) - group[0].start <= READ_BYTES
    parts = sorted((piece.file, piece.start, piece.stop) for group in groups for piece in group)
    for file, start, length in spans:
        covered = start
        while covered < start + length:
            reach = [stop for f, begin, stop in parts if f == file and begin <= covered < stop]
            assert reach
            covered = max(reach)
    assert sum(stop - start for _, start, stop in parts) == sum(length for _, _, length in spans)


def test_a_small_read_fetches_little(memory_store: MemoryStore, attempt: Attempt) -> None:
    shapes = {"big": (1_000_000,)}
    save(memory_store, attempt, 4, shapes=shapes, world_size=1)
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    reader = CheckpointReader(memory_store, "run-1", manifest)
    target = torch.empty(1000)
    reader.read(list(resume.pieces_of(manifest, "big", "exp_avg", 500_000, target)))
    assert torch.equal(target, random_values(shapes)["big"]["exp_avg"][500_000:501_000])
    assert reader.bytes_read <= 2 * 64 * 1024


# -- pure parts


def published(rank: int, fragments: list[tuple[str, int, int]]) -> dict[str, Any]:
    return {
        "file": {
            "key": f"g/rank-{rank}.safetensors", "size_bytes": 1000, "index_key": f"g/rank-{rank}.index",
            "index_sha256": "0" * 64,
        },
        "fragments": [
            {"parameter": name, "start": start, "length": length, "offsets": dict.fromkeys(KINDS, 0)}
            for name, start, length in fragments
        ],
        "buffers": {},
    }  # fmt: skip


def test_assemble_orders_fragments_by_their_start() -> None:
    parts = [published(0, [("w", 20, 15), ("bias", 0, 3)]), published(1, [("scale", 0, 1), ("w", 0, 20)])]
    attempt = Attempt(run_id="run-1", number=3, nonce="ff")
    manifest = assemble(parts, shapes=SHAPES, attempt=attempt, nonce="ab", scalars=scalars(4))
    assert [(f.file, f.start) for f in manifest.parameters["w"].fragments] == [(1, 0), (0, 20)]
    assert (manifest.attempt, manifest.nonce, manifest.world_size, manifest.run_id) == (3, "ab", 2, "run-1")


def test_assemble_refuses_holes() -> None:
    attempt = Attempt(run_id="run-1", number=3, nonce="ff")
    with pytest.raises(ValueError, match="w: 20 of 35 elements"):
        assemble(
            [published(0, [("w", 0, 20), ("bias", 0, 3), ("scale", 0, 1)])],
            shapes=SHAPES, attempt=attempt, nonce="ab", scalars=scalars(4),
        )  # fmt: skip


def test_persistent_buffers_have_their_full_names() -> None:
    assert list(persistent_buffers(Buffers())) == [
        "mask", "count", "mean", "inner.running_mean", "inner.running_var", "inner.num_batches_tracked",
    ]  # fmt: skip


# -- retention


class Deletions(MemoryStore):
    """Remembers each call's keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deleted: list[list[str]] = []

    def delete(self, keys: Any) -> None:
        batch = list(keys)
        self.deleted.append(batch)
        super().delete(batch)


def test_the_newest_are_kept_and_a_manifest_goes_first() -> None:
    store = Deletions(prefix="headway")
    attempt = claim_attempt(store, "run-1", facts={})
    for step in (2, 4, 6, 8):
        save(store, attempt, step, keep=10)
    store.deleted.clear()
    remove_old(store, attempt, keep=2, just_committed=8)
    assert committed_steps(store, "run-1") == [8, 6]
    assert {key.split("/")[3] for key in store.objects if "/checkpoints/" in key} == {"step-00000006", "step-00000008"}
    assert store.deleted[0] == [layout.checkpoint_manifest("run-1", 2)]
    assert store.deleted[2] == [layout.checkpoint_manifest("run-1", 4)]
    for step in (6, 8):
        manifest, _ = read_manifest(store, "run-1", step)
        CheckpointReader(store, "run-1", manifest).check_all()


def test_leftovers_go_and_what_is_under_way_stays(memory_store: MemoryStore, attempt: Attempt) -> None:
    second = claim_attempt(memory_store, "run-1", facts={})
    save(memory_store, second, 8)

    def leave(step: int, folder: str) -> str:
        key = f"{layout.checkpoint('run-1', step)}{folder}/rank-00000.safetensors"
        memory_store.upload(key, b"x")
        return key

    gone = [leave(3, "00001-aaaa"), leave(5, "00002-bbbb")]
    stay = [leave(9, "00002-aabb"), leave(9, "00001-aaaa"), leave(7, "00003-cccc"), leave(12, "00003-cccc")]
    remove_old(memory_store, second, keep=3, just_committed=8)
    assert not [key for key in gone if key in memory_store.objects]
    assert all(key in memory_store.objects for key in stay)
    assert committed_steps(memory_store, "run-1") == [8]


def test_what_comes_after_the_step_just_committed_stays(memory_store: MemoryStore, attempt: Attempt) -> None:
    memory_store.upload(f"{layout.checkpoint('run-1', 3)}00001-aaaa/rank-00000.safetensors", b"x")
    before = memory_store.objects
    remove_old(memory_store, attempt, keep=1, just_committed=2)
    assert memory_store.objects == before


def test_the_step_just_committed_stays_below_a_newer_damaged_one(memory_store: MemoryStore, attempt: Attempt) -> None:
    save(memory_store, attempt, 8)
    save(memory_store, attempt, 4, keep=1)
    assert committed_steps(memory_store, "run-1") == [8, 4]
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    CheckpointReader(memory_store, "run-1", manifest).check_all()


def test_many_ranks_make_one_checkpoint(memory_store: MemoryStore, attempt: Attempt) -> None:
    """More ranks than some parameters have elements."""
    assert save(memory_store, attempt, 4, world_size=8) == [None] * 8
    manifest, _ = read_manifest(memory_store, "run-1", 4)
    assert len(manifest.files) == 8
    CheckpointReader(memory_store, "run-1", manifest).check_all()
