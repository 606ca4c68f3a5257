"""What goes into rows comes out of them: tokens, targets, and where each conversation starts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.packing import pack
from orchestrator.dataset.rows import (
    MAX_TOKENS,
    conversation_entries,
    labelled_row,
    num_targets,
    packed_row,
    target_ids,
    unpack_labelled,
    unpack_packed,
)

ROW, PAD = 24, 7
TOKENS = st.integers(0, MAX_TOKENS - 1)
CONVERSATIONS = st.lists(st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=ROW), min_size=1, max_size=30)


@given(conversations=CONVERSATIONS)
def test_every_target_is_in_the_rows_once_and_no_conversation_crosses_them(
    conversations: list[list[tuple[int, bool]]],
) -> None:
    entries = [conversation_entries([t for t, _ in one], np.array([m for _, m in one])) for one in conversations]
    rows = pack([len(one) for one in entries], ROW)
    found = unpack_packed(np.stack([packed_row([entries[i] for i in r], row_tokens=ROW, pad_id=PAD) for r in rows]))
    seen = []
    for number, row in enumerate(rows):
        starts = [*np.flatnonzero(found["positions"][number] == 0).tolist(), ROW]
        pieces = list(pairwise(starts))
        for item, (start, end) in zip(row, pieces, strict=False):
            wanted = conversations[item]
            assert found["tokens"][number, start:end].tolist() == [token for token, _ in wanted]
            assert found["is_target"][number, start:end].tolist() == [False, *(mark for _, mark in wanted[1:])]
            assert found["positions"][number, start:end].tolist() == list(range(end - start))
            seen.append(item)
        for start, end in pieces[len(row) :]:  # padding: at most one conversation of its own
            assert (len(pieces), end) == (len(row) + 1, ROW)
            assert found["tokens"][number, start:end].tolist() == [PAD] * (end - start)
            assert not found["is_target"][number, start:end].any()
    assert sorted(seen) == list(range(len(conversations)))
    assert found["is_target"].sum() == sum(num_targets(one) for one in entries)


def test_the_first_token_of_a_conversation_is_no_target() -> None:
    entries = conversation_entries([5, 6, 7], np.array([True, True, False]))
    assert (num_targets(entries), target_ids(entries).tolist()) == (1, [6])


def test_a_labelled_row() -> None:
    rows = np.stack(
        [labelled_row(3, [9, PAD, 9], row_tokens=6, pad_id=PAD), labelled_row(0, [1] * 5, row_tokens=6, pad_id=PAD)]
    )
    found = unpack_labelled(rows)
    assert found["label"].tolist() == [3, 0]
    assert found["length"].tolist() == [3, 5]
    assert found["tokens"].tolist() == [[9, PAD, 9, PAD, PAD], [1] * 5]
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(
        ["tokens", "label", "length"], np.int64
    )


@pytest.mark.parametrize("size", [0, 1])
def test_a_conversation_too_short_to_learn_from_has_no_targets(size: int) -> None:
    assert num_targets(conversation_entries([1] * size, np.ones(size, dtype=np.bool_))) == 0
