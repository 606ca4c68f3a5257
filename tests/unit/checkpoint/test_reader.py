"""Reads fetch little, are checked, and outlast damage that only the wire did."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.blocks import coalesce
from orchestrator.checkpoint.catalog import read_manifest
from orchestrator.checkpoint.reader import READ_BYTES, CheckpointReader, Piece, pieces_of
from orchestrator.checkpoint.tensors import byte_view
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import IntegrityError, NotFound
from tests.unit.checkpoint.saving import manifest_at, new_group, resumed_step, save
from tests.unit.checkpoint.states import random_values
from tests.unit.fakes import MemoryStore

BIG: dict[str, tuple[int, ...]] = {"big": (1_000_000,)}


class BadWire(MemoryStore):
    """Damages the first ``bad_reads`` reads of each key that ends in ``of``; what is stored is sound."""

    of, bad_reads = "", 0

    def get(self, key: str) -> bytes:
        return self._carried(key, super().get(key))

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        return self._carried(key, super().get_range(key, start, num_bytes))

    def break_wire(self, of: str, bad_reads: int) -> None:
        self.of, self.bad_reads, self.num_reads = of, bad_reads, Counter[str]()

    def _carried(self, key: str, data: bytes) -> bytes:
        if not self.of or not key.endswith(self.of):
            return data
        self.num_reads[key] += 1
        is_bad = self.num_reads[key] <= self.bad_reads
        return data[:-1] + bytes([data[-1] ^ 1]) if is_bad and data else data


PARTS = ["manifest.json", "rank-00001.index", "rank-00000.safetensors"]


@pytest.fixture
def wire() -> BadWire:
    store = BadWire(prefix="headway")
    group = new_group(store)
    for step in (4, 8):
        assert save(store, group, step) == [None, None]
    return store


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bad_reads", [1, 2])
def test_what_only_the_wire_damaged_is_read_again(wire: BadWire, part: str, bad_reads: int) -> None:
    folder, _ = manifest_at(wire, 8)
    wire.break_wire(part, bad_reads)
    assert verify(wire, folder).num_files == 2
    wire.break_wire(part, bad_reads)
    assert resumed_step(wire) == 8
    assert max(wire.num_reads.values()) > bad_reads


@pytest.mark.parametrize("part", PARTS)
def test_what_stays_wrong_is_damage(wire: BadWire, part: str) -> None:
    folder, _ = manifest_at(wire, 8)
    wire.break_wire(part, 10**9)
    with pytest.raises(IntegrityError, match=part):
        verify(wire, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_commit_outlasts_a_bad_wire(rank: int) -> None:
    store = BadWire(prefix="headway")
    store.break_wire(f"rank-0000{rank}.json", 2)
    assert save(store, new_group(store), 4) == [None, None]
    store.break_wire("", 0)
    verify(store, manifest_at(store, 4)[0])


def test_a_commit_of_what_stays_wrong_fails() -> None:
    store = BadWire(prefix="headway")
    store.break_wire("rank-00001.json", 10**9)
    first, second = save(store, new_group(store), 4)
    assert isinstance(first, IntegrityError)
    assert "rank-00001.json is damaged" in str(first)
    assert second is None


def test_a_small_read_fetches_little(memory_store: MemoryStore) -> None:
    save(memory_store, new_group(memory_store), 4, shapes=BIG, world_size=1)
    folder, manifest = manifest_at(memory_store, 4)
    reader = CheckpointReader(memory_store, folder, manifest)
    target = torch.empty(1000)
    reader.read(pieces_of(manifest, "big", "exp_avg", 500_000, byte_view(target)))
    assert torch.equal(target, random_values(BIG)["big"]["exp_avg"][500_000:501_000])
    assert reader.bytes_read <= 2 * 64 * 1024


def test_a_file_that_went_missing_is_not_found(memory_store: MemoryStore) -> None:
    save(memory_store, new_group(memory_store), 4)
    folder, manifest = manifest_at(memory_store, 4)
    memory_store.delete([folder.prefix + manifest.files[0].key])
    reader = CheckpointReader(memory_store, folder, read_manifest(memory_store, folder)[0])
    with pytest.raises(NotFound):
        reader.check_file(0)
    with pytest.raises(IntegrityError, match="holds None bytes"):
        reader.check_indexes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5 * READ_BYTES), st.integers(0, 3 * READ_BYTES)),
        min_size=1,
        max_size=12,
    )
)
def test_coalesced_reads_cover_every_byte_within_the_limit(spans: list[tuple[int, int, int]]) -> None:
    room = memoryview(bytearray(3 * READ_BYTES))
    pieces = [Piece(file=file, start=start, target=room[:length]) for file, start, length in spans]
    groups = list(coalesce(pieces))
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
