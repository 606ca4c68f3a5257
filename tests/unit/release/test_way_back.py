from __future__ import annotations

from random import Random

import pytest

from orchestrator.release.channels import Canary, ChannelEntry, ChannelStatus
from orchestrator.release.way_back import InForce, Verdicts, in_force, ladder, step_back

TENTH, WHY = 0.1, "slow"
NONE = Verdicts()


def rejecting(*versions: int) -> Verdicts:
    return Verdicts(rejected=dict.fromkeys(versions, WHY))


def history(*versions: int | tuple[int, int]) -> list[ChannelEntry]:
    """Entries of these versions; a pair is a version and its canary."""
    return [
        ChannelEntry(
            number=number,
            version=version if isinstance(version, int) else version[0],
            canary=None if isinstance(version, int) else Canary(version=version[1], weight=TENTH),
            by="me",
            reason="why",
            created_s=0.0,
            nonce="0",
        )
        for number, version in enumerate(versions, start=1)
    ]


@pytest.mark.parametrize(
    ("entries", "verdicts", "rungs", "back"),
    [
        ([], NONE, (), None),
        ([1], NONE, (1,), None),
        ([1, 2], NONE, (1, 2), 1),
        ([1, 1, 2, 2], NONE, (1, 2), 1),
        # A second rollback goes further down.
        ([1, 2, 3, 2], NONE, (1, 2), 1),
        ([1, 2, 3, 2, 1], NONE, (1,), None),
        ([1, 2, 3, 1, 3], NONE, (1, 3), 1),
        # Rejected versions are on no rung; going back from one says what serves anyway.
        ([1, 2, 3], rejecting(3), (1, 2), 2),
        ([1, 2, 3], rejecting(2), (1, 3), 1),
        ([1, 2], rejecting(1, 2), (), None),
        ([1, 2, 1], rejecting(1), (2,), 2),
        # A canary that is still to prove itself is taken back first.
        ([1, (1, 2)], NONE, (1,), 1),
        ([1, 2, (2, 3)], NONE, (1, 2), 2),
        ([1, (1, 2)], Verdicts(promoted={2: 2}), (1, 2), 1),
        ([1, (1, 2), (2, 3)], Verdicts(promoted={2: 2, 3: 3}), (1, 2, 3), 2),
        # So is one that the server rejected a moment before.
        ([1, (1, 2)], rejecting(2), (1,), 1),
        ([1, 2, (2, 3)], rejecting(3), (1, 2), 2),
        ([1, 2, (2, 3), 2], rejecting(3), (1, 2), 1),
        # Promoted, and rejected all the same later on.
        ([1, (1, 2)], Verdicts(promoted={2: 2}, rejected={2: WHY}), (1,), 1),
    ],
)
def test_the_ladder(
    entries: list[int | tuple[int, int]], verdicts: Verdicts, rungs: tuple[int, ...], back: int | None
) -> None:
    assert ladder(history(*entries), verdicts) == rungs
    assert step_back(history(*entries), verdicts) == back


def test_what_is_in_force() -> None:
    canary = Canary(version=2, weight=TENTH)
    assert in_force([], NONE) == InForce(version=None)
    assert in_force(history(1, (1, 2)), NONE) == InForce(version=1, canary=canary)
    assert in_force(history(1, (1, 2)), Verdicts(promoted={2: 2})) == InForce(version=2)
    assert in_force(history(1, (1, 2)), rejecting(2)) == InForce(version=1)
    assert in_force(history(1, (1, 2), 1), NONE) == InForce(version=1)
    assert in_force(history((1, 2)), rejecting(1)) == InForce(version=None)
    assert in_force(history(2, (2, 2)), NONE) == InForce(version=2)


def test_the_top_of_the_ladder_is_in_force() -> None:
    random = Random(7)
    for _ in range(500):
        versions = [random.randint(1, 5) for _ in range(random.randint(0, 8))]
        entries = history(*(random.choice([each, (each, random.randint(1, 5))]) for each in versions))
        canaries = {entry.number: entry.canary.version for entry in entries if entry.canary}
        verdicts = Verdicts(
            rejected=dict.fromkeys(random.sample(range(1, 6), random.randint(0, 3)), WHY),
            promoted={number: version for number, version in canaries.items() if random.random() < 0.5},
        )
        rungs = ladder(entries, verdicts)
        assert in_force(entries, verdicts).version == (rungs[-1] if rungs else None)
        assert len(set(rungs)) == len(rungs)
        assert not set(rungs) & verdicts.rejected.keys()


def test_verdicts_are_the_status() -> None:
    assert Verdicts.of(None) == NONE
    found = Verdicts.of(ChannelStatus(rejected={3: "NaN"}, promoted={2: 2}))
    assert set(found.rejected) == {3}
    assert set(found.promoted) == {2}
