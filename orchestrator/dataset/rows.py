"""Rows of a packed or a labelled dataset: 32-bit entries that hold a token's id and what it is for.

Shapes: B rows, L sequence_length, R = L + 1 entries of a row.

A packed row holds whole conversations one after the other. A token's entry is its id, with :data:`TARGET` set where
the model is to predict it and :data:`START` where a conversation starts. What is left of a row is padding: a
conversation of its own, without a target. A labelled row is the class and then L token ids, with :data:`START` set on
the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TARGET = 1 << 31
START = 1 << 30
_TOKEN = START - 1
MAX_TOKENS = START
"""Ids below this fit beside the two marks."""

U32 = npt.NDArray[np.uint32]
Rows = dict[str, npt.NDArray[Any]]


def conversation_entries(token_ids: Sequence[int], is_target: npt.NDArray[np.bool_]) -> U32:
    """A conversation as entries. Its first token follows nothing, so that it is no target whatever is asked."""
    entries = np.asarray(token_ids, dtype=np.uint32)
    entries[is_target] |= np.uint32(TARGET)
    entries[:1] = (entries[:1] & np.uint32(_TOKEN)) | np.uint32(START)
    return entries


def num_targets(entries: U32) -> int:
    return int(np.count_nonzero(entries & np.uint32(TARGET)))


def target_ids(entries: U32) -> U32:
    """Ids of the tokens that are targets."""
    found: U32 = entries[(entries & np.uint32(TARGET)) != 0] & np.uint32(_TOKEN)
    return found


def packed_row(conversations: Sequence[U32], *, row_tokens: int, pad_id: int) -> U32:
    """One row of ``row_tokens`` entries; the conversations fit it together."""
    row = np.full(row_tokens, pad_id, dtype=np.uint32)
    filled = 0
    for entries in conversations:
        row[filled : filled + len(entries)] = entries
        filled += len(entries)
    row[filled : filled + 1] |= np.uint32(START)
    return row


def labelled_row(label: int, token_ids: Sequence[int], *, row_tokens: int, pad_id: int) -> U32:
    """One row of ``row_tokens`` entries for at most ``row_tokens - 1`` tokens."""
    row = np.full(row_tokens, pad_id | START, dtype=np.uint32)
    row[0] = label
    row[1 : 1 + len(token_ids)] = token_ids
    return row


def unpack_packed(entries: U32) -> Rows:
    """What (B, R) entries hold: ``tokens``, ``is_target`` and ``positions``, each (B, R).

    Positions start again at 0 with each conversation and with the padding.
    """
    places = np.arange(entries.shape[1], dtype=np.int64)
    starts = np.where(entries & np.uint32(START), places, 0)
    return {
        "tokens": (entries & np.uint32(_TOKEN)).astype(np.int64),
        "is_target": (entries & np.uint32(TARGET)) != 0,
        "positions": places - np.maximum.accumulate(starts, axis=1),
    }


def unpack_labelled(entries: U32) -> Rows:
    """What (B, R) entries hold: ``tokens`` (B, L), ``label`` (B,), and ``length`` (B,), the tokens before padding."""
    tokens = entries[:, 1:]
    return {
        "tokens": (tokens & np.uint32(_TOKEN)).astype(np.int64),
        "label": entries[:, 0].astype(np.int64),
        "length": np.count_nonzero((tokens & np.uint32(START)) == 0, axis=1).astype(np.int64),
    }
