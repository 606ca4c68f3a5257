"""What a group's time went to while it trained: kept, or lost when a later group resumed before it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.record.groups import Group, Spent

Part = Literal[
    "queued",
    "starting",
    "resuming",
    "preparing",
    "computing",
    "waiting for data",
    "saving",
    "evaluating",
    "exporting",
    "lost to rollback",
    "idle",
]


class Piece(NamedTuple):
    """From ``start_s`` on, until the next piece, the group's time went to ``part``."""

    start_s: float
    part: Part
    lost_to: int | None = None
    """Index of the group that resumed before it, where it was lost."""


class Rollbacks:
    """Which steps of which group were trained in vain, by the checkpoints that later groups went on from."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._first_steps = [group.first_step for group in groups]
        self._lowest_after: list[float] = [float("inf")]
        for first_step in reversed(self._first_steps[1:]):
            self._lowest_after.append(min(first_step, self._lowest_after[-1]))
        self._lowest_after.reverse()

    def lost_to(self, index: int, step: int) -> int | None:
        """Index of the group by which the step that group ``index`` did was lost; None where it counts."""
        if step <= self._lowest_after[index]:
            return None
        later = range(index + 1, len(self._first_steps))
        return next(each for each in later if self._first_steps[each] < step)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Steps one after the other that share their fate."""

    start_s: float
    spent: Spent
    lost_to: int | None


def pieces_of(group: Group, index: int, rollbacks: Rollbacks, *, grain_s: float, is_alive: bool) -> Iterator[Piece]:
    """Where the time of one group went, from the start of its training on.

    Args:
        is_alive: it trains at this moment, so that the step it is at may count.
        grain_s: steps that are shorter together are told of as one: their seconds are exact, their order is not.
    """
    start_s = group.trains_s
    for block in _blocks(group, index, rollbacks, grain_s):
        yield from _of_block(block)
        start_s = block.spent.time_s
    if group.after_s is not None:
        # What came after a last step that was lost, was lost with it.
        lost_to = rollbacks.lost_to(index, group.after_s.step)
        yield from _of_block(_Block(start_s=start_s, spent=group.after_s, lost_to=lost_to))
    else:
        lost_to = rollbacks.lost_to(index, group.reached + 1)
        yield Piece(start_s, "computing" if lost_to is None and is_alive else "lost to rollback", lost_to)


def _blocks(group: Group, index: int, rollbacks: Rollbacks, grain_s: float) -> Iterator[_Block]:
    start_s = group.trains_s
    held: list[Spent] = []
    held_lost_to: int | None = None
    for step in group.steps:
        lost_to = rollbacks.lost_to(index, step.step)
        if held and (lost_to != held_lost_to or held[-1].time_s - start_s >= grain_s):
            yield _Block(start_s=start_s, spent=_together(held), lost_to=held_lost_to)
            start_s, held = held[-1].time_s, []
        held.append(step)
        held_lost_to = lost_to
    if held:
        yield _Block(start_s=start_s, spent=_together(held), lost_to=held_lost_to)


def _together(steps: Sequence[Spent]) -> Spent:
    """Several steps as one."""
    return steps[-1]._replace(
        waiting_s=math.fsum(each.waiting_s for each in steps),
        saving_s=math.fsum(each.saving_s for each in steps),
        evaluating_s=math.fsum(each.evaluating_s for each in steps),
    )


def _of_block(block: _Block) -> Iterable[Piece]:
    """Looks and saves come between steps, so first; then the step, which waits for data at its end.

    What is not accounted for is computing. Where more is than there was time for, all shrink alike.
    """
    spent, length_s = block.spent, max(0.0, block.spent.time_s - block.start_s)
    if block.lost_to is not None:
        return [Piece(block.start_s, "lost to rollback", block.lost_to)]
    told_s = spent.evaluating_s + spent.saving_s + spent.waiting_s
    scale = min(1.0, length_s / told_s) if told_s > 0 else 1.0
    saving_s = block.start_s + spent.evaluating_s * scale
    computing_s = saving_s + spent.saving_s * scale
    return [
        Piece(block.start_s, "evaluating"),
        Piece(saving_s, "saving"),
        Piece(computing_s, "computing"),
        Piece(max(computing_s, spent.time_s - spent.waiting_s * scale), "waiting for data"),
    ]
