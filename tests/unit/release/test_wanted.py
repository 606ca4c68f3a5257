from __future__ import annotations

from typing import Any

import pytest

from orchestrator.release.channels import Canary, ChannelEntry
from orchestrator.release.wanted import wanted


def entry(number: int, version: int, canary: int | None = None) -> ChannelEntry:
    return ChannelEntry(
        number=number,
        version=version,
        canary=None if canary is None else Canary(version=canary, weight=0.1),
        by="me",
        reason="",
        created_s=0.0,
        nonce="",
    )


def aim(
    entries: list[ChannelEntry | None], rejected: tuple[int, ...] = (), promoted: dict[int, int] | None = None
) -> Any:
    """Stable version and canary. None stands for an entry that cannot be read."""
    by_number = dict(enumerate(entries, start=1))
    found = wanted(
        list(by_number), by_number.__getitem__, rejected=dict.fromkeys(rejected, "bad"), promoted=promoted or {}
    )
    return None if found is None else (found.stable, found.canary)


@pytest.mark.parametrize(
    ("entries", "rejected", "promoted", "expected"),
    [
        ([], (), {}, None),
        ([None], (), {}, None),
        ([entry(1, 1)], (), {}, (1, None)),
        ([entry(1, 1), entry(2, 2)], (), {}, (2, None)),
        ([entry(1, 1), entry(2, 2), None], (), {}, (2, None)),
        ([entry(1, 1), entry(2, 2)], (2,), {}, (1, None)),
        ([entry(1, 1), entry(2, 2)], (1, 2), {}, None),
        # A canary, beside the stable version, which may be that of an entry before.
        ([entry(1, 1, 2)], (), {}, (1, 2)),
        ([entry(1, 1, 2)], (2,), {}, (1, None)),
        ([entry(1, 1), entry(2, 2, 3)], (2,), {}, (1, 3)),
        ([entry(1, 1, 1)], (), {}, (1, None)),
        ([entry(1, 1, 2)], (1,), {}, None),
        ([entry(1, 1, 2), None], (), {}, (1, 2)),
        # One of an entry before counts no more.
        ([entry(1, 1, 2), entry(2, 1)], (), {}, (1, None)),
        ([entry(1, 1, 2), entry(2, 3)], (3,), {}, (1, None)),
        # Promoted, in the place of its entry's version, and in that entry alone.
        ([entry(1, 1, 2)], (), {1: 2}, (2, None)),
        ([entry(1, 1, 2)], (2,), {1: 2}, (1, None)),
        ([entry(1, 1, 2), entry(2, 1, 2)], (), {1: 2}, (1, 2)),
        ([entry(1, 1, 2), entry(2, 3)], (3,), {1: 2}, (2, None)),
        ([entry(1, 1, 2), entry(2, 1)], (), {1: 2}, (1, None)),  # a rollback
    ],
)
def test_what_is_wanted(
    entries: list[ChannelEntry | None], rejected: tuple[int, ...], promoted: dict[int, int], expected: Any
) -> None:
    assert aim(entries, rejected, promoted) == expected


def test_no_more_entries_are_read_than_must_be() -> None:
    read: list[int] = []

    def entry_of(number: int) -> ChannelEntry:
        read.append(number)
        return entry(number, number)

    wanted(range(1, 100), entry_of, rejected={99: "bad"}, promoted={})
    assert read == [99, 98]


def test_both_entries_are_named() -> None:
    found = wanted([1, 2], {1: entry(1, 1), 2: entry(2, 2, 3)}.get, rejected={2: "bad"}, promoted={})
    assert found is not None
    assert (found.entry.number, found.canary_entry and found.canary_entry.number, found.weight) == (1, 2, 0.1)
