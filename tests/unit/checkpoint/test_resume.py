"""Every cut resumes at every other, from the newest checkpoint that verifies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoint.random_state import RandomState
from orchestrator.checkpoint.resume import load_weights, resume_newest
from orchestrator.checkpoint.tensors import persistent_buffers
from orchestrator.errors import IntegrityError, NotFound, RunError
from orchestrator.store import WorkerGroup, claim_group, layout
from tests.unit.checkpoint.saving import (
    FROZEN,
    RUN,
    SHAPES,
    Buffers,
    fill_frozen,
    finish,
    flip,
    frozen_values,
    is_equal,
    load,
    manifest_at,
    new_group,
    resumed_step,
    save,
    writer_of,
)
from tests.unit.checkpoint.states import FakeState, random_values, scalars
from tests.unit.fakes import MemoryStore


@pytest.fixture
def group(memory_store: MemoryStore) -> WorkerGroup:
    return new_group(memory_store)


@pytest.mark.parametrize("written_by", [1, 2, 3, 5])
@pytest.mark.parametrize("read_by", [1, 2, 4])
@pytest.mark.parametrize("frozen_is_replicated", [True, False])
def test_any_cut_resumes_at_any_other(
    memory_store: MemoryStore, group: WorkerGroup, written_by: int, read_by: int, frozen_is_replicated: bool
) -> None:
    values, frozen = random_values(SHAPES), frozen_values()
    errors = save(
        memory_store, group, 4, values=values, frozen=frozen, world_size=written_by, module=Buffers(5),
        frozen_is_replicated=not frozen_is_replicated,
    )  # fmt: skip
    assert errors == [None] * written_by
    cut: dict[str, Any] = {"frozen_shapes": FROZEN, "frozen_is_replicated": frozen_is_replicated}
    for rank in range(read_by):
        module = Buffers()
        state, found = load(memory_store, rank=rank, world_size=read_by, module=module, **cut)
        expected = FakeState(SHAPES, rank=rank, world_size=read_by, **cut)
        expected.fill(values)
        fill_frozen(expected, frozen)
        assert is_equal(state, expected)
        assert found is not None
        assert (found.step, state.optimizer_step, state.num_refreshed) == (4, 4, 1)
        for name, buffer in persistent_buffers(module).items():
            assert torch.equal(buffer, persistent_buffers(Buffers(5))[name])
        assert torch.equal(module.cache, torch.zeros(4))


def test_without_a_checkpoint_there_is_nothing_to_resume(memory_store: MemoryStore) -> None:
    state, found = load(memory_store)
    assert found is None
    assert state.num_refreshed == 0


@pytest.mark.parametrize("newer", ["group", "attempt"])
def test_of_one_step_the_newest_claims_folder_is_taken(
    memory_store: MemoryStore, group: WorkerGroup, newer: str
) -> None:
    save(memory_store, group, 4, values=random_values(SHAPES, seed=1))
    kept = memory_store.objects
    again = claim_group(memory_store, group.attempt) if newer == "group" else new_group(memory_store)
    values = random_values(SHAPES, seed=2)
    save(memory_store, again, 4, values=values)
    for key, data in kept.items():
        memory_store.tamper(key, data)
    state, found = load(memory_store)
    assert found is not None
    assert (found.folder.attempt, found.folder.group) == (again.attempt.number, again.number)
    assert torch.equal(state.fragments()[0].tensors["fp32"], values["w"]["fp32"])


def test_the_loss_scale_comes_back_where_there_is_one(memory_store: MemoryStore, group: WorkerGroup) -> None:
    scale: dict[str, float | int | bool] = {"cur_scale": 1024.0, "cur_iter": 7}
    writer = writer_of(memory_store, group, FakeState(SHAPES))
    writer.save(scalars(4).model_copy(update={"loss_scaler": scale}))
    assert finish(writer).error is None
    scaled, plain = FakeState(SHAPES), FakeState(SHAPES)
    scaled.loss_scaler = {"cur_scale": 1.0, "cur_iter": 0}
    for state in (scaled, plain):
        resume_newest(memory_store, RUN, state, nn.Module(), rank=0)  # type: ignore[arg-type]
    assert scaled.loss_scaler == scale
    assert plain.loss_scaler is None


# -- another model


@pytest.mark.parametrize(
    ("shapes", "frozen", "words"),
    [
        ({**SHAPES, "w": (5, 7)}, FROZEN, r"holds w as \(\(7, 5\), 'trained'\), the model has it as \(\(5, 7\)"),
        ({**SHAPES, "more": (1,)}, FROZEN, "holds more as None"),
        ({k: v for k, v in SHAPES.items() if k != "bias"}, FROZEN, r"holds bias as .*, the model has it as None"),
        (SHAPES, {**FROZEN, "emb": (torch.float32, (5, 3))}, "holds emb as .*frozen, BF16.*frozen, F32"),
        (SHAPES, {**FROZEN, "emb": (torch.bfloat16, (3, 5))}, "holds emb as"),
        ({**SHAPES, "emb": (5, 3)}, {k: v for k, v in FROZEN.items() if k != "emb"}, "holds emb as .*frozen.*trained"),
    ],
)
def test_the_parameter_that_differs_is_named(
    memory_store: MemoryStore, group: WorkerGroup, shapes: Any, frozen: Any, words: str
) -> None:
    save(memory_store, group, 4, frozen=frozen_values())
    with pytest.raises(RunError, match=words):
        load(memory_store, shapes=shapes, frozen_shapes=frozen)


def test_another_models_buffers_are_refused(memory_store: MemoryStore, group: WorkerGroup) -> None:
    save(memory_store, group, 8)
    with pytest.raises(RunError, match="no matching buffer mask"):
        load(memory_store, module=Buffers())


# -- damage


def test_the_one_before_is_taken_and_the_part_named(
    memory_store: MemoryStore, group: WorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = random_values(SHAPES, seed=1), random_values(SHAPES, seed=2)
    save(memory_store, group, 4, values=older)
    save(memory_store, group, 8, values=newer)
    folder, manifest = manifest_at(memory_store, 8)
    flip(memory_store, folder.prefix + manifest.files[1].key)
    state, found = load(memory_store)
    assert found is not None
    assert found.step == 4
    assert torch.equal(state.fragments()[0].tensors["fp32"], older["w"]["fp32"])
    assert state.num_refreshed == 1
    assert "The checkpoint of step 8 cannot be used, trying the one before: s3://memory/headway/" in caplog.text
    assert f"{manifest.files[1].key}: block 0 " in caplog.text


@pytest.mark.parametrize("part", ["manifest", "index", "size", "missing", "no index"])
def test_every_part_is_checked(
    memory_store: MemoryStore, group: WorkerGroup, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    save(memory_store, group, 4)
    save(memory_store, group, 8)
    folder, manifest = manifest_at(memory_store, 8)
    file = manifest.files[1]
    named = {"manifest": "manifest.json", "index": file.index_key, "no index": file.index_key}.get(part, file.key)
    key = folder.prefix + named
    if part in ("manifest", "index"):
        flip(memory_store, key, 3)
    elif part == "size":
        memory_store.tamper(key, memory_store.get(key)[:-1])
    else:
        memory_store.delete([key])
    assert resumed_step(memory_store) == 4
    assert named in caplog.text


def test_all_damaged_is_no_fresh_start(memory_store: MemoryStore, group: WorkerGroup) -> None:
    save(memory_store, group, 4)
    folder, manifest = manifest_at(memory_store, 4)
    flip(memory_store, folder.prefix + manifest.files[0].key)
    with pytest.raises(IntegrityError, match="None of the checkpoints committed for run-1 can be used") as caught:
        load(memory_store)
    assert "s3://memory/headway/runs/run-1/checkpoints/" in caught.value.next_step


# -- random state


def test_random_state_comes_back_only_to_ranks_that_there_were(
    memory_store: MemoryStore, group: WorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    random = RandomState()
    writer = writer_of(memory_store, group, FakeState(SHAPES), random=random)
    writer.save(scalars(4))
    assert finish(writer).error is None
    expected = torch.rand(3)
    for rank, comes_back in ((0, True), (1, False)):
        torch.manual_seed(99)
        fresh = RandomState()
        resume_newest(memory_store, RUN, FakeState(SHAPES), nn.Module(), rank=0, random=None)  # type: ignore[arg-type]
        _restore(memory_store, fresh, rank)
        assert torch.equal(torch.rand(3), expected) == comes_back
    assert "Rank 1 keeps its own random state" in caplog.text


def test_random_state_that_does_not_fit_is_left(
    memory_store: MemoryStore, group: WorkerGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """Another version's generator: its bytes must not be read as this one's, nor past them."""
    saved = RandomState()
    saved.tensors["torch"] = saved.tensors["torch"][:-8].clone()
    saved.capture = lambda: None  # type: ignore[method-assign]
    writer = writer_of(memory_store, group, FakeState(SHAPES), random=saved)
    writer.save(scalars(4))
    assert finish(writer).error is None
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _restore(memory_store, RandomState(), 0)
    assert torch.equal(torch.rand(3), expected)
    assert "Rank 0 keeps its own random state" in caplog.text


def _restore(store: MemoryStore, random: RandomState, rank: int) -> None:
    from orchestrator.checkpoint.reader import CheckpointReader
    from orchestrator.checkpoint.resume import _restore_random

    _restore_random(CheckpointReader(store, *manifest_at(store, 4)), random, rank=rank)


# -- another run's weights


class Reads(MemoryStore):
    """Notes which pins there are whenever a rank file is read."""

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        if key.endswith(".safetensors"):
            self.pins_seen = [name for name in self.objects if "/pins/" in name]
        return super().get_range(key, start, num_bytes)


def test_only_weights_come_from_another_run() -> None:
    store = Reads(prefix="headway")
    values, frozen = random_values(SHAPES), frozen_values()
    save(store, new_group(store), 4, values=values, frozen=frozen, module=Buffers(5))
    state, module = FakeState(SHAPES, frozen_shapes=FROZEN), Buffers()
    moments = random_values(SHAPES, seed=9)
    state.fill(moments)
    folder = load_weights(store, RUN, 4, state, module, rank=0)  # type: ignore[arg-type]
    assert folder.step == 4
    expected = FakeState(SHAPES, frozen_shapes=FROZEN)
    expected.fill({name: {**moments[name], "fp32": values[name]["fp32"]} for name in SHAPES})
    fill_frozen(expected, frozen)
    assert is_equal(state, expected)
    assert (state.optimizer_step, state.num_refreshed, int(module.count)) == (0, 1, 5)
    (pin,) = store.pins_seen
    assert pin.startswith(layout.checkpoint_pins(RUN, 4))
    assert not [key for key in store.objects if "/pins/" in key]


def test_a_damaged_source_is_refused_and_unpinned(memory_store: MemoryStore, group: WorkerGroup) -> None:
    save(memory_store, group, 4)
    save(memory_store, group, 8)
    folder, manifest = manifest_at(memory_store, 8)
    flip(memory_store, folder.prefix + manifest.files[0].key)
    with pytest.raises(IntegrityError, match="block 0"):
        load_weights(memory_store, RUN, 8, FakeState(SHAPES), nn.Module(), rank=0)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no committed checkpoint of step 6"):
        load_weights(memory_store, RUN, 6, FakeState(SHAPES), nn.Module(), rank=0)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="holds w as"):
        load_weights(memory_store, RUN, 4, FakeState({**SHAPES, "w": (2,)}), nn.Module(), rank=0)  # type: ignore[arg-type]
    assert not [key for key in memory_store.objects if "/pins/" in key]
