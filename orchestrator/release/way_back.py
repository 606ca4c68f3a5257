"""Which version a channel has in force, and which one a rollback leads to. Pure.

A channel's versions form a ladder: releasing a version puts it on top, going back to one takes away what lies above.
So a second rollback goes further down, and not back up to what the first one left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.release.channels import Canary, ChannelEntry, ChannelStatus


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

    rejected: Collection[int] = ()
    promoted: Collection[int] = ()
    """Numbers of the entries whose canary has proved itself: from then on it is that entry's version."""

    @classmethod
    def of(cls, status: ChannelStatus | None) -> Verdicts:
        """Those of a status; none where no server has looked at the channel yet."""
        return cls() if status is None else cls(rejected=status.rejected, promoted=status.promoted)


def in_force(history: Sequence[ChannelEntry], verdicts: Verdicts) -> InForce:
    """What serves, or is to serve, by entries of rising numbers and the server's verdicts.

    It is the top of the ladder, beside the newest entry's canary where that is neither promoted nor rejected.
    """
    rungs = ladder(history, verdicts)
    top = rungs[-1] if rungs else None
    canary = history[-1].canary if history else None
    if canary is None or canary.version in verdicts.rejected or history[-1].number in verdicts.promoted:
        return InForce(version=top)
    return InForce(version=top, canary=canary if canary.version != top else None)


def ladder(history: Sequence[ChannelEntry], verdicts: Verdicts) -> tuple[int, ...]:
    """The versions that served or were to serve, rejected ones left out; the last is in force."""
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

    Where that entry brought a canary, or a version that was rejected, the version in force undoes it; otherwise it is
    the one below on the ladder.
    """
    rungs = ladder(history, verdicts)
    if not rungs:
        return None
    newest = history[-1]
    undecided = in_force(history, verdicts).canary is not None
    if undecided or _steps(newest, verdicts)[-1] in verdicts.rejected:
        return rungs[-1]
    return rungs[-2] if len(rungs) > 1 else None


def _steps(entry: ChannelEntry, verdicts: Verdicts) -> tuple[int, ...]:
    if entry.canary is not None and entry.number in verdicts.promoted:
        return (entry.version, entry.canary.version)
    return (entry.version,)
