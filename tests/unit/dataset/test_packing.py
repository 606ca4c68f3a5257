"""Packing: everything is in one row, once; no row is over-full; and rows are filled about as well as can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.packing import WINDOW, pack

ROW = 64
LENGTHS = st.lists(st.integers(1, ROW), max_size=200)
WINDOWS = st.integers(1, 20)


@given(lengths=LENGTHS, window=WINDOWS)
def test_every_item_is_in_one_row(lengths: list[int], window: int) -> None:
    rows = pack(lengths, ROW, window=window)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    assert all(0 < sum(lengths[item] for item in row) <= ROW for row in rows)


@given(lengths=LENGTHS, window=WINDOWS)
def test_it_is_the_same_at_every_call(lengths: list[int], window: int) -> None:
    assert pack(iter(lengths), ROW, window=window) == pack(lengths, ROW, window=window)


@given(lengths=LENGTHS)
def test_rows_are_in_the_order_of_their_first_items(lengths: list[int]) -> None:
    firsts = [row[0] for row in pack(lengths, ROW)]
    assert firsts == sorted(firsts)


@given(lengths=LENGTHS)
def test_no_two_rows_would_fit_into_one_while_all_are_open(lengths: list[int]) -> None:
    totals = sorted(sum(lengths[item] for item in row) for row in pack(lengths, ROW))
    assert len(totals) < 2 or totals[0] + totals[1] > ROW


def test_the_row_that_is_filled_best_is_taken_and_of_two_the_older() -> None:
    assert pack([40, 50, 60, 4, 10, 10], ROW) == [[0, 5], [1, 4], [2, 3]]
    assert pack([40, 40, 20], ROW) == [[0, 2], [1]]


def test_where_too_many_are_open_the_fullest_is_closed() -> None:
    assert pack([60, 40, 4], ROW, window=2) == [[0, 2], [1]]
    assert pack([60, 40, 4], ROW, window=1) == [[0], [1, 2]]


def test_real_lengths_leave_little_room() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 1.0, 5000).astype(int) + 1, 1, 1025)
    rows = pack(lengths.tolist(), 1025)
    assert sum(lengths) / (1025 * len(rows)) > 0.97
    unbounded = pack(lengths.tolist(), 1025, window=10**6)
    assert len(rows) <= 1.01 * len(unbounded)
    assert WINDOW < 1000


@pytest.mark.parametrize("length", [0, ROW + 1])
def test_what_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"item 1 of {length} tokens"):
        pack([1, length], ROW)
