"""Which versions are to answer, as a function of what the store holds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.release.channels import ChannelEntry


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The versions that are to answer. ``weight`` is the canary's share of the requests."""

    entry: ChannelEntry
    """The one that names :attr:`stable`."""
    stable: int
    canary: int | None = None
    weight: float = 0.0
    canary_entry: ChannelEntry | None = None
    """The one that names :attr:`canary`."""


def wanted(
    numbers: Sequence[int],
    entry_of: Callable[[int], ChannelEntry | None],
    *,
    rejected: Mapping[int, str],
    promoted: Mapping[int, int],
) -> Wanted | None:
    """The newest entry's versions; in the place of a stable one that was rejected, that of the entry before.

    A canary counts only in the newest entry that can be read. Reads no more entries than it must.

    Args:
        entry_of: an entry, or None where what lies there is not one.
        rejected: versions that may not answer, and why.
        promoted: by entry, its canary that has passed.
    """
    newest: ChannelEntry | None = None
    for number in sorted(numbers, reverse=True):
        entry = entry_of(number)
        if entry is None:
            continue
        newest = newest or entry
        for version in (promoted.get(number), entry.version):
            if version is not None and version not in rejected:
                return _with_canary(entry, version, newest, rejected)
    return None


def _with_canary(entry: ChannelEntry, stable: int, newest: ChannelEntry, rejected: Mapping[int, str]) -> Wanted:
    canary = newest.canary
    if canary is None or canary.version in rejected or canary.version == stable:
        return Wanted(entry=entry, stable=stable)
    return Wanted(entry=entry, stable=stable, canary=canary.version, weight=canary.weight, canary_entry=newest)
