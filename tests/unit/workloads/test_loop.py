"""In which order the loop looks at the held-out split and saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.checkpoint.format import State
from orchestrator.spec import EvaluateSpec, parse
from workloads.in_run_evaluation import Looks
from workloads.loop import Loop

LIMITS = EvaluateSpec(every_steps=2, patience=1)
SPEC = parse(
    {
        "apiVersion": "headway/v1",
        "name": "demo",
        "model": {"architecture": {"model_type": "llama"}},
        "data": {"train": "data/*.txt"},
        "train": {"steps": 6, "evaluate": LIMITS.model_dump()},
        "checkpoint": {"every_steps": 3},
    }
)


class Recorder:
    """Everything around the loop; writes down what was done."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.done: list[Any] = []
        self.states: list[State] = []
        self.limits, self.losses, self.step = LIMITS, losses, 0

    def is_due(self, step: int, *, total_steps: int) -> bool:
        return step % LIMITS.every_steps == 0 or step == total_steps

    def loss(self, progress: Any) -> float:
        progress()
        return self.losses[self.step]

    def look(self, figures: dict[str, float], **_: object) -> None:
        self.done.append(("look", figures["step"]))

    def save(self, state: State, *, urgent: bool) -> None:
        self.done.append(("urgent save" if urgent else "save", state.step))
        self.states.append(state)

    def saves(self, _: object) -> None: ...

    def at(self, step: int, phase: str) -> None: ...


def loop_with(recorder: Recorder) -> Loop:
    engine = SimpleNamespace(precision="fp32", state=SimpleNamespace(optimizer_step=0, loss_scaler=None))
    fields: dict[str, Any] = {
        **dict.fromkeys(["evaluation", "writer", "observer", "pulse"], recorder),
        **dict.fromkeys(["task", "batches"]),
        "engine": engine,
    }
    return Loop(
        spec=SPEC,
        total_steps=6,
        dataset_fingerprint="0" * 16,
        rank=0,
        **fields,
    )


def settle(recorder: Recorder, step: int, looks: Looks, **flags: bool) -> tuple[Looks, bool]:
    recorder.step = step
    return loop_with(recorder).settle(step, 1.0, looks, **{"stopping": False, "preempted": False, **flags})


def test_a_look_comes_before_the_save_that_tells_of_it() -> None:
    recorder = Recorder({0: 3.0, 6: 2.0})
    looks, is_over = settle(recorder, 6, Looks(best_loss=3.0, at_step=4))
    assert recorder.done == [("look", 6), ("urgent save", 6)]
    assert Looks.of_extra(recorder.states[0].extra) == looks == Looks(best_loss=2.0, best_step=6, at_step=6)
    assert is_over


@pytest.mark.parametrize(("step", "done"), [(1, []), (2, [("look", 2)]), (3, [("save", 3)])])
def test_each_where_it_is_due(step: int, done: list[Any]) -> None:
    recorder = Recorder({2: 1.0})
    _, is_over = settle(recorder, step, Looks(best_loss=3.0, at_step=0))
    assert recorder.done == done
    assert not is_over


def test_the_look_that_ends_training_is_saved_at_once() -> None:
    recorder = Recorder({2: 4.0})
    looks, is_over = settle(recorder, 2, Looks(best_loss=3.0, at_step=0))
    assert looks.ended_early
    assert is_over
    assert recorder.done == [("look", 2), ("urgent save", 2)]
    assert Looks.of_extra(recorder.states[0].extra).ended_early


def test_who_is_stopped_leaves_the_look_to_whoever_resumes() -> None:
    recorder = Recorder({2: 4.0})
    before = Looks(best_loss=3.0, at_step=0)
    assert settle(recorder, 2, before, stopping=True) == (before, False)
    assert recorder.done == [("urgent save", 2)]
    assert Looks.of_extra(recorder.states[0].extra) == before


def test_who_is_to_be_taken_away_saves_first() -> None:
    recorder = Recorder({2: 4.0})
    looks, is_over = settle(recorder, 2, Looks(best_loss=3.0, at_step=0), preempted=True)
    assert recorder.done == [("urgent save", 2), ("look", 2)]
    assert looks.ended_early
    assert not is_over
    assert not Looks.of_extra(recorder.states[0].extra).ended_early
    _, is_over = settle(recorder, 3, looks, preempted=True)
    assert is_over
    assert recorder.done[2:] == [("urgent save", 3)]
    assert Looks.of_extra(recorder.states[1].extra).ended_early
