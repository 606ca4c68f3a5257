"""Damage in each kind of file of a committed checkpoint: verify names it, and a resume takes the one before."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from orchestrator.checkpoint.catalog import MANIFEST, Folder, committed, find
from orchestrator.checkpoint.format import BLOCK_BYTES
from orchestrator.checkpoint.resume import resume_newest
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.store import Store, WorkerGroup
from tests.conftest import IS_FULL
from tests.faults.ranks import KnownState
from tests.unit.checkpoint.saving import RUN, finish, new_group, writer_of
from tests.unit.checkpoint.states import scalars

TABLE_BYTES = 3 * BLOCK_BYTES


def save(store: Store, group: WorkerGroup, *steps: int) -> None:
    """Checkpoints by two ranks."""
    known = [KnownState(rank=rank, world_size=2, table_bytes=TABLE_BYTES) for rank in range(2)]
    writers = [
        writer_of(store, group, each.tensors, rank=rank, world_size=2, module=each.module)
        for rank, each in enumerate(known)
    ]
    for step in steps:
        for each, writer in zip(known, writers, strict=True):
            each.fill(step)
            writer.save(scalars(step))
        assert [writer.wait().error for writer in writers] == [None, None]  # type: ignore[union-attr]
    for writer in writers:
        finish(writer)


def resumed(store: Store) -> tuple[int, int]:
    """The step that a resume takes, and how many of its elements are wrong."""
    known = KnownState(rank=0, world_size=1, table_bytes=TABLE_BYTES)
    found = resume_newest(store, RUN, known.tensors, known.module, rank=0)  # type: ignore[arg-type]
    assert found is not None
    return found.step, known.num_wrong(found.step)


Harm = Callable[[bytearray], bytes]


def flipped(at: int) -> Harm:
    def flip(data: bytearray) -> bytes:
        data[at] ^= 1
        return bytes(data)

    return flip


@dataclass(frozen=True)
class Case:
    """What is done to one file of the newest checkpoint."""

    name: str
    """The file's, within the folder."""
    harm: Harm | None
    """None: it is deleted."""


CASES = {
    "header": Case("rank-00000.safetensors", flipped(20)),
    "header's length": Case("rank-00001.safetensors", flipped(0)),
    "first tensor": Case("rank-00001.safetensors", flipped(540)),
    "buffer": Case("rank-00000.safetensors", flipped(2 * BLOCK_BYTES + 5)),
    "last byte": Case("rank-00000.safetensors", flipped(-1)),
    "index": Case("rank-00001.index", flipped(3)),
    "manifest": Case(MANIFEST, flipped(100)),
    "manifest's digest": Case(MANIFEST, flipped(-10)),
    "a file cut short": Case("rank-00000.safetensors", lambda data: bytes(data[:-BLOCK_BYTES])),
    "a file with a byte more": Case("rank-00000.safetensors", lambda data: bytes(data) + b"x"),
    "an index cut short": Case("rank-00000.index", lambda data: bytes(data[:-32])),
    "an empty file": Case("rank-00001.safetensors", lambda _: b""),
    "a manifest cut short": Case(MANIFEST, lambda data: bytes(data[:-1])),
    "no file": Case("rank-00001.safetensors", None),
    "no index": Case("rank-00001.index", None),
}


QUICK = ("header", "buffer", "index", "manifest", "a file cut short", "no file")


@pytest.mark.parametrize("name", CASES if IS_FULL else QUICK)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    save(store, new_group(store), 1, 2)
    key = find(store, RUN, 2).prefix + case.name
    if case.harm is None:
        store.delete([key])
    else:
        store.upload(key, case.harm(bytearray(store.get(key))))
    with pytest.raises((IntegrityError, NotFound), match=re.escape(case.name)):
        verify(store, find(store, RUN, 2))
    caplog.clear()
    assert resumed(store) == (1, 0)
    assert "The checkpoint of step 2 cannot be used" in caplog.text
    assert case.name in caplog.text
    verify(store, find(store, RUN, 1))


def test_what_ranks_published_is_not_read_after_the_commit(store: Store) -> None:
    save(store, new_group(store), 1)
    folder = find(store, RUN, 1)
    store.upload(folder.prefix + "rank-00001.json", b"{}")
    store.delete([folder.prefix + "rank-00000.json"])
    verify(store, folder)
    assert resumed(store) == (1, 0)


def test_what_a_rank_published_is_damaged_before_the_commit(store: Store) -> None:
    group = new_group(store)
    save(store, group, 1)
    known = [KnownState(rank=rank, world_size=2, table_bytes=TABLE_BYTES) for rank in range(2)]
    first, second = (
        writer_of(store, group, each.tensors, rank=rank, world_size=2, module=each.module)
        for rank, each in enumerate(known)
    )
    second.save(scalars(2))
    assert finish(second).error is None
    key = f"{find(store, RUN, 1).prefix}rank-00001.json".replace("step-00000001", "step-00000002")
    store.upload(key, flipped(30)(bytearray(store.get(key))))
    first.save(scalars(2))
    assert "rank-00001.json is damaged" in str(finish(first).error)
    assert [folder.step for folder in committed(store, RUN)] == [1]


def test_files_of_two_ranks_are_swapped(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    save(store, new_group(store), 1, 2)
    folder = find(store, RUN, 2)
    for suffix in ("safetensors", "index"):
        one, other = (folder.prefix + f"rank-0000{rank}.{suffix}" for rank in range(2))
        held = store.get(one)
        store.upload(one, store.get(other))
        store.upload(other, held)
    with pytest.raises(IntegrityError, match="rank-00000"):
        verify(store, folder)
    assert resumed(store) == (1, 0)
    assert "rank-00000" in caplog.text


def test_an_older_checkpoint_lies_in_a_newer_folder(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    group = new_group(store)
    save(store, group, 1)
    old = find(store, RUN, 1)
    new = Folder(run_id=RUN, step=2, attempt=old.attempt, group=old.group, nonce=old.nonce)
    for item in list(store.list(old.prefix)):
        store.upload(new.prefix + item.key.removeprefix(old.prefix), store.get(item.key))
    with pytest.raises(IntegrityError, match="is the manifest of another checkpoint: step 1"):
        verify(store, new)
    assert resumed(store) == (1, 0)
    assert "is the manifest of another checkpoint" in caplog.text


def test_files_of_another_step_lie_under_a_manifest(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Whole, valid files with their own indexes: only the manifest's digests tell them apart."""
    save(store, new_group(store), 1, 2)
    old, new = find(store, RUN, 1), find(store, RUN, 2)
    for name in ("rank-00001.safetensors", "rank-00001.index"):
        store.upload(new.prefix + name, store.get(old.prefix + name))
    with pytest.raises(IntegrityError, match=r"rank-00001\.index"):
        verify(store, new)
    assert resumed(store) == (1, 0)
    assert "rank-00001.index" in caplog.text


def test_all_are_damaged(store: Store) -> None:
    save(store, new_group(store), 1, 2)
    for step in (1, 2):
        key = find(store, RUN, step).prefix + "rank-00000.index"
        store.upload(key, flipped(0)(bytearray(store.get(key))))
    with pytest.raises(IntegrityError, match="None of the checkpoints"):
        resumed(store)


def test_every_bit_of_a_small_file_counts(store: Store) -> None:
    """A sample of all positions, header and body alike."""
    save(store, new_group(store), 1)
    folder = find(store, RUN, 1)
    key = folder.prefix + "rank-00001.safetensors"
    data = store.get(key)
    for at in torch.linspace(0, len(data) - 1, 20).long().tolist():
        store.upload(key, flipped(at)(bytearray(data)))
        with pytest.raises(IntegrityError, match=r"rank-00001\.safetensors: block 0"):
            verify(store, folder)
    store.upload(key, data)
    verify(store, folder)
