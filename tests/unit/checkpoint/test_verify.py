"""``verify`` reads every byte, and a header that lies is refused whatever it says."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.verify import (
    MAX_HEADER_BYTES,
    expected_tensors,
    header_bytes,
    parse_header,
    require_same_tensors,
    verify,
)
from orchestrator.errors import IntegrityError, NotFound
from tests.unit.checkpoint.documents import changed, places
from tests.unit.checkpoint.saving import Buffers, flip, frozen_values, manifest_at, new_group, resumed_step, save
from tests.unit.fakes import MemoryStore

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "none": {"dtype": "F32", "shape": [0, 2], "data_offsets": [16, 16]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
    "c": {"dtype": "BOOL", "shape": [3], "data_offsets": [18, 21]},
}
DATA_BYTES = 21


def parsed(header: Any, *, data_bytes: int = DATA_BYTES) -> dict[str, tuple[str, int, int]]:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(data, file_bytes=8 + len(data) + data_bytes, source="s3://b/x")


@pytest.fixture
def two(memory_store: MemoryStore) -> MemoryStore:
    """Committed checkpoints of steps 4 and 8, with frozen parameters and buffers, by two ranks."""
    group = new_group(memory_store)
    for step in (4, 8):
        errors = save(memory_store, group, step, frozen=frozen_values(), module=Buffers(5), frozen_is_replicated=False)
        assert errors == [None, None]
    return memory_store


def test_a_sound_checkpoint_verifies_to_its_last_byte(two: MemoryStore) -> None:
    folder, manifest = manifest_at(two, 8)
    found = verify(two, folder)
    assert found.num_files == 2
    assert found.num_bytes >= manifest.size_bytes


@pytest.mark.parametrize("rank", [0, 1])
def test_no_byte_of_a_rank_file_changes_unseen(two: MemoryStore, rank: int) -> None:
    folder, manifest = manifest_at(two, 8)
    key = folder.prefix + manifest.files[rank].key
    sound = two.get(key)
    for position in range(len(sound)):
        flip(two, key, position)
        with pytest.raises(IntegrityError, match=rf"rank-0000{rank}\.safetensors: block 0 "):
            verify(two, folder)
        two.tamper(key, sound)
    verify(two, folder)


@pytest.mark.parametrize("name", ["index", "manifest.json"])
def test_no_byte_of_an_index_or_the_manifest_changes_unseen(two: MemoryStore, name: str) -> None:
    folder, manifest = manifest_at(two, 8)
    name = manifest.files[1].index_key if name == "index" else name
    sound = two.get(folder.prefix + name)
    for position in range(len(sound)):
        flip(two, folder.prefix + name, position)
        with pytest.raises(IntegrityError, match=name):
            verify(two, folder)
        two.tamper(folder.prefix + name, sound)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00001.index"])
def test_another_size_is_seen(two: MemoryStore, name: str, change: Any) -> None:
    folder, _ = manifest_at(two, 8)
    two.tamper(folder.prefix + name, change(two.get(folder.prefix + name)))
    with pytest.raises(IntegrityError, match=name):
        verify(two, folder)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00001.index", "manifest.json"])
def test_what_is_missing_is_named(two: MemoryStore, name: str) -> None:
    folder, _ = manifest_at(two, 8)
    two.delete([folder.prefix + name])
    with pytest.raises((IntegrityError, NotFound), match=name):
        verify(two, folder)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.index", "manifest.json"])
def test_a_run_goes_on_from_the_checkpoint_before(memory_store: MemoryStore, name: str) -> None:
    group = new_group(memory_store)
    save(memory_store, group, 4)
    save(memory_store, group, 8)
    folder, _ = manifest_at(memory_store, 8)
    flip(memory_store, folder.prefix + name, -20)
    assert resumed_step(memory_store) == 4


def test_what_ranks_told_each_other_is_not_needed_after_the_commit(memory_store: MemoryStore) -> None:
    save(memory_store, new_group(memory_store), 8)
    folder, _ = manifest_at(memory_store, 8)
    flip(memory_store, folder.prefix + "rank-00000.json", 5)
    memory_store.delete([folder.prefix + "rank-00001.json"])
    assert verify(memory_store, folder).num_files == 2
    assert resumed_step(memory_store) == 8


# -- headers


def test_a_sound_header_is_read() -> None:
    start = 8 + len(json.dumps(HEADER))
    assert parsed(HEADER) == {
        "a": ("F32", start, start + 16),
        "none": ("F32", start + 16, start + 16),
        "b": ("BF16", start + 16, start + 18),
        "c": ("BOOL", start + 18, start + 21),
    }


@pytest.mark.parametrize("size", [0, 1, 93, 2**31, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_header_that_cannot_be_that_long_is_refused(size: int) -> None:
    with pytest.raises(IntegrityError, match=f"its header would take {size} bytes of 100"):
        header_bytes(struct.pack("<Q", size), file_bytes=100, source="x")


def test_the_longest_header_is_the_formats() -> None:
    assert header_bytes(struct.pack("<Q", MAX_HEADER_BYTES), file_bytes=2**40, source="x") == MAX_HEADER_BYTES
    with pytest.raises(IntegrityError):
        header_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1), file_bytes=2**40, source="x")
    for short in (b"", b"\x02\0\0\0\0\0\0"):
        with pytest.raises(IntegrityError):
            header_bytes(short, file_bytes=len(short), source="x")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": ["0", "16"]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, float("inf")]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 16]},
        {"dtype": "U8", "shape": [10**4200], "data_offsets": [0, 10**4200]},
        {"dtype": "pickle", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2]},
        {"shape": [2, 2], "data_offsets": [0, 16]},
        {},
        [],
        None,
        "a",
        7,
    ],
    ids=lambda entry: str(entry)[:50],
)  # fmt: skip
def test_an_entry_that_lies_is_refused(entry: Any) -> None:
    with pytest.raises(IntegrityError, match=r"^s3://b/x"):
        parsed({**HEADER, "a": entry})


def test_tensors_that_overlap_or_leave_bytes_are_refused() -> None:
    with pytest.raises(IntegrityError, match="where it cannot"):
        parsed({**HEADER, "d": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}})
    with pytest.raises(IntegrityError, match="its last 3 bytes belong to no tensor"):
        parsed({name: entry for name, entry in HEADER.items() if name != "c"})
    with pytest.raises(IntegrityError, match="where it cannot"):
        parsed({name: entry for name, entry in HEADER.items() if name != "b"})
    with pytest.raises(IntegrityError, match="its last 1 bytes"):
        parsed(HEADER, data_bytes=DATA_BYTES + 1)
    with pytest.raises(IntegrityError):
        parsed(HEADER, data_bytes=DATA_BYTES - 1)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"7", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000],
    ids=lambda data: repr(data[:10]),
)  # fmt: skip
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^s3://b/x is no safetensors file"):
        parsed(data)


def test_a_huge_shape_in_a_header_is_refused_at_once() -> None:
    started = time.process_time()
    for shape in ([10**4000] * 2000, [2**62] * 60_000, [0, 10**4000]):
        with pytest.raises(IntegrityError):
            parsed({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, data_bytes=0)
    assert time.process_time() - started < 2.0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 24) | st.floats() | st.sampled_from(["F32", "U8", 2**63, 10**4200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(HEADER)), VALUES | st.just("delete")), min_size=1, max_size=3))
def test_whatever_a_header_says_it_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    header = json.dumps(changed(changes, HEADER)).encode()
    try:
        found = parsed(header)
    except IntegrityError:
        return
    assert sum(stop - start for _, start, stop in found.values()) == DATA_BYTES


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        assert parsed(data, data_bytes=0) == {}
    except IntegrityError:
        return


def test_the_header_has_to_agree_with_the_manifest(two: MemoryStore) -> None:
    _, manifest = manifest_at(two, 8)
    expected = expected_tensors(manifest, 0)
    require_same_tensors(dict(expected), expected, source="x")
    assert {"fp32/w", "exp_avg/w", "exp_avg_sq/w", "frozen/emb", "buffer/count"} <= expected.keys()
    dtype, start, stop = expected["fp32/w"]
    for lie in ({"fp32/w": (dtype, start + 4, stop + 4)}, {"fp32/w": ("I32", start, stop)}, {"more": ("U8", 0, 1)}):
        with pytest.raises(IntegrityError, match=f"its header has {next(iter(lie))} at"):
            require_same_tensors({**expected, **lie}, expected, source="x")
    with pytest.raises(IntegrityError, match="at None"):
        require_same_tensors({}, expected, source="x")
