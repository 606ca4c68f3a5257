"""Which version a channel has in force, and which one a rollback leads to. Pure.

A channel's versions form a ladder: releasing a version puts it on top, going back to one takes away what lies above.
So a second rollback goes further down, and not back up to what the first one left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.release.channels import Canary, ChannelEntry, ChannelStatus
from orchestrator.release.wanted import wanted


@dataclass(frozen=True, kw_only=True)
class InForce:
    """What an entry comes to once the server has judged it."""

    version: int | None
    """Answers, or is to answer once it is loaded. None where nothing that was released may serve."""
    canary: Canary | None = None
    """Is still to prove itself beside it."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What the server made of versions, as its status tells."""

    rejected: Mapping[int, str] = field(default_factory=dict)
    promoted: Mapping[int, int] = field(default_factory=dict)
    """By entry, its canary that has proved itself, and is that entry's version from then on."""

    @classmethod
    def of(cls, status: ChannelStatus | None) -> Verdicts:
        """Those of a status; none where no server has looked at the channel yet."""
        return cls() if status is None else cls(rejected=status.rejected, promoted=status.promoted)


def in_force(history: Sequence[ChannelEntry], verdicts: Verdicts) -> InForce:
    """What serves, or is to serve, by entries of rising numbers and the server's verdicts: as the server sees it."""
    entries = {entry.number: entry for entry in history}
    found = wanted(list(entries), entries.get, rejected=verdicts.rejected, promoted=verdicts.promoted)
    if found is None:
        return InForce(version=None)
    canary = None if found.canary is None else Canary(version=found.canary, weight=found.weight)
    return InForce(version=found.stable, canary=canary)


def ladder(history: Sequence[ChannelEntry], verdicts: Verdicts) -> tuple[int, ...]:
    """The versions that served or were to serve, rejected ones left out; the last is the one in force."""
    rungs: list[int] = []
    for entry in history:
        for version in _steps(entry, verdicts):
            if version in rungs:
                del rungs[rungs.index(version) + 1 :]
            elif version not in verdicts.rejected:
                rungs.append(version)
    return tuple(rungs)


def step_back(history: Sequence[ChannelEntry], verdicts: Verdicts) -> int | None:
    """The version that undoes the newest entry; None where there is none to go back to.

    Where that entry brought a canary that has not passed, or a version that was rejected, the version in force undoes
    it, whether or not the server was faster; otherwise it is the one below on the ladder.
    """
    rungs = ladder(history, verdicts)
    if not rungs:
        return None
    newest = history[-1]
    brought_canary = newest.canary is not None and newest.number not in verdicts.promoted
    if brought_canary or _steps(newest, verdicts)[-1] in verdicts.rejected:
        return rungs[-1]
    return rungs[-2] if len(rungs) > 1 else None


def _steps(entry: ChannelEntry, verdicts: Verdicts) -> tuple[int, ...]:
    if entry.number in verdicts.promoted:
        return (entry.version, verdicts.promoted[entry.number])
    return (entry.version,)
