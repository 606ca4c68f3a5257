"""What each group of workers of a run did and how it ended, from the run's events. Pure.

A group's own events are its rank 0's. What became of a group that died is told by the driver, which heard its beats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.record.model import Event

WORKER_KINDS = frozenset({"training", "step", "look", "checkpoint", "checkpoint_failed", "training_done"})
"""Kinds of events that a group's rank 0 stamps with its own clock."""


class Spent(NamedTuple):
    """One optimizer step, or several, and what the time since the one before went to beside computing."""

    time_s: float
    step: int
    waiting_s: float
    saving_s: float
    evaluating_s: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """One start of the workers. Times are seconds since 1970."""

    attempt: int
    number: int
    first_step: int
    """Of the checkpoint that it goes on from; 0 starts anew."""
    world_size: int
    device: str
    flops_per_token: float | None
    tokens_per_step: float
    load_s: float
    started_s: float
    trains_s: float
    """When it began to train."""
    steps: tuple[Spent, ...]
    after_s: Spent | None
    """What it noted after its last step: looks, and the wait for its last save."""
    done_s: float | None
    """When its training was over; None where it never was."""
    died_s: float
    """When it was last heard of, where it never was over."""
    is_lost: bool
    """Whether the driver told that it died."""
    reached: int
    """The last step that it is known to have done."""
    end: str
    """How it ended, in words; empty where that is not known."""


@dataclass
class _Events:
    """A group's events while they are sorted out."""

    training: Event
    own: list[Event] = field(default_factory=list)
    told: list[Event] = field(default_factory=list)
    """What the driver told of it: ``hang``, ``group_lost``."""


def time_of(event: Event, name: str) -> float:
    """A time that newer events tell by themselves; of others, when they were noted."""
    return float(event[name] if name in event else event["time_s"])


def groups_of(attempt: int, events: Iterable[Event]) -> list[Group]:
    """The groups of one attempt, by its events in the order of their time."""
    found: list[_Events] = []
    for event in events:
        if event["kind"] == "training":
            found.append(_Events(event))
        elif found and event["kind"] in WORKER_KINDS | {"preemption"}:
            found[-1].own.append(event)
        elif found and event["kind"] in ("hang", "group_lost"):
            # A loss may be told of once the next group trains.
            named = [each for each in found if each.training.get("group") == event.get("group")]
            (named or found)[-1].told.append(event)
    return [_group(attempt, index + 1, each) for index, each in enumerate(found)]


def _group(attempt: int, position: int, events: _Events) -> Group:
    training, first_step = events.training, int(events.training["first_step"])
    steps, after = _steps(events.own, first_step)
    done = next((event for event in events.own if event["kind"] == "training_done"), None)
    lost = next((event for event in events.told if event["kind"] == "group_lost"), None)
    last_s = max(float(event["time_s"]) for event in [training, *events.own])
    per_step = [event["tokens"] / event["step"] for event in events.own if event["kind"] == "step"]
    return Group(
        attempt=attempt,
        number=int(training.get("group", position)),
        first_step=first_step,
        world_size=int(training["world_size"]),
        device=str(training.get("device", "")),
        flops_per_token=training.get("flops_per_token"),
        tokens_per_step=per_step[-1] if per_step else 0.0,
        load_s=float(training.get("load_s", 0.0)),
        started_s=time_of(training, "started_s"),
        trains_s=float(training["time_s"]),
        steps=steps,
        after_s=after,
        done_s=float(done["time_s"]) if done else None,
        died_s=max([last_s, *(time_of(event, "heard_s") for event in events.told)]),
        is_lost=bool(events.told),
        reached=max([first_step, *(each.step for each in steps), _done_before(lost)]),
        end=_in_words(events, lost),
    )


def _steps(events: Sequence[Event], first_step: int) -> tuple[tuple[Spent, ...], Spent | None]:
    """The steps, and what came after the last one. What does not go forward is of a group that should be dead."""
    steps: list[Spent] = []
    looked_s, reached = 0.0, first_step
    for event in events:
        if event["kind"] == "look":
            looked_s += float(event.get("seconds", 0.0))
        elif event["kind"] == "step" and int(event["step"]) > reached:
            reached = int(event["step"])
            waiting_s, saving_s = float(event.get("data_wait_s", 0.0)), float(event.get("save_s", 0.0))
            steps.append(_spent(event, reached, waiting_s=waiting_s, saving_s=saving_s, evaluating_s=looked_s))
            looked_s = 0.0
        elif event["kind"] == "training_done":
            saving_s = float(event.get("save_s", 0.0))
            return tuple(steps), _spent(event, reached, waiting_s=0.0, saving_s=saving_s, evaluating_s=looked_s)
    return tuple(steps), None


def _spent(event: Event, step: int, **seconds: float) -> Spent:
    return Spent(time_s=float(event["time_s"]), step=step, **seconds)


def _done_before(lost: Event | None) -> int:
    """The step that was done when a group was lost: where it saved, the one it names, else the one before."""
    if lost is None:
        return 0
    step = int(lost["step"])
    return step if lost["phase"] == "saving" else step - 1


def _in_words(events: _Events, lost: dict[str, Any] | None) -> str:
    hang = next((event for event in events.told if event["kind"] == "hang"), None)
    if hang is not None:
        ranks = ", ".join(str(rank) for rank in hang["ranks"])
        return f"rank {ranks} was {hang['reason']}: {hang['phase']}, step {hang['step']}"
    if any(event["kind"] == "preemption" for event in events.own):
        return "a node was taken away"
    if lost is not None:
        who = "its workers died" if lost["rank"] is None else f"rank {lost['rank']} fell silent"
        return f"{who}: {lost['phase']}, step {lost['step']}"
    return ""
