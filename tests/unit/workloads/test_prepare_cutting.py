"""The cut of a source into parts: nothing is lost, sizes are bounded, and a file more shifts hardly anything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.source import Slice, SourceFile
from orchestrator.spec import DataSpec
from workloads.prepare.cutting import MAX_PART_BYTES, MIN_PART_BYTES, cut, part_bytes, slices_of

MIB = 2**20


def source_file(number: int, size_bytes: int) -> SourceFile:
    return SourceFile(uri=f"s3://corpus/{number:04d}", path=f"{number:04d}", etag="e", size_bytes=size_bytes)


def whole(sizes: list[int]) -> list[Slice]:
    return [Slice(file=source_file(number, size)) for number, size in enumerate(sizes)]


@given(sizes=st.lists(st.integers(1, 40 * MIB), max_size=80))
def test_a_cut_keeps_every_slice_in_order(sizes: list[int]) -> None:
    slices, usual = whole(sizes), part_bytes(sum(sizes))
    parts = list(cut(slices, usual))
    assert [piece for part in parts for piece in part] == slices
    assert all(parts)
    for part in parts:
        assert sum(piece.size_bytes for piece in part[:-1]) < 2 * usual
    for part in parts[:-1]:
        assert sum(piece.size_bytes for piece in part) >= usual // 4
    assert list(cut(slices, usual)) == parts


def test_parts_have_the_usual_size_on_average() -> None:
    slices = whole([MIB // 8] * 9000)
    assert 0.7 < len(list(cut(slices, 4 * MIB))) / (9000 / 32) < 1.4


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 2000), size=st.integers(1, 4 * MIB))
def test_a_file_more_changes_a_few_parts_alone(number: int, size: int) -> None:
    slices = whole([(1 + number % 7) * 20_000 for number in range(2000)])
    more = Slice(file=SourceFile(uri="s3://corpus/new", path="new", etag="e", size_bytes=size))
    before = list(cut(slices, 4 * MIB))
    after = list(cut([*slices[:number], more, *slices[number:]], 4 * MIB))
    assert len([part for part in after if part not in before]) <= 5
    assert len(before) > 25


@pytest.mark.parametrize(
    ("source_bytes", "expected"),
    [(0, MIN_PART_BYTES), (20 * MIB, MIN_PART_BYTES), (100 * MIB, 4 * MIB), (127 * MIB, 4 * MIB)],
)
def test_the_usual_size_is_a_power_of_two(source_bytes: int, expected: int) -> None:
    assert part_bytes(source_bytes) == expected
    assert part_bytes(2**50) == MAX_PART_BYTES


@pytest.mark.parametrize(
    ("format_", "size_bytes", "of"),
    [
        ("text", 2**34, 1),
        ("source", 2**20, 1),
        ("jsonl", 1, 1),
        ("jsonl", 10 * MIB, 10),
        ("jsonl", 1024 * MIB, 256),
        ("jsonl", 2**40, 2**16),
        ("parquet", 100 * MIB, 1),
        ("parquet", 640 * MIB, 10),
    ],
)
def test_how_a_file_is_sliced_follows_from_its_size(format_: str, size_bytes: int, of: int) -> None:
    data = DataSpec.model_validate({"train": "s3://corpus/**", "format": format_})
    slices = slices_of([source_file(0, size_bytes)], data)
    assert [piece.number for piece in slices] == list(range(of))
    assert {piece.of for piece in slices} == {of}
    assert slices_of([source_file(1, 7), source_file(0, size_bytes)], data)[-of:] == slices
