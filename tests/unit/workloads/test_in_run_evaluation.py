"""What looks at the held-out split decide, and how they reach whoever resumes."""

from __future__ import annotations

import math

import pytest

from orchestrator.errors import IntegrityError
from orchestrator.spec import EvaluateSpec
from workloads.in_run_evaluation import Looks


def after(losses: list[float], *, every_steps: int = 10, **limits: float) -> Looks:
    spec = EvaluateSpec.model_validate({"every_steps": every_steps, **limits})
    looks = Looks()
    for number, loss in enumerate(losses):
        looks = looks.after(loss, step=number * every_steps, limits=spec)
        looks = Looks.of_extra(looks.as_extra())  # as if each were resumed
    return looks


@pytest.mark.parametrize(
    ("losses", "limits", "ended"),
    [
        ([3.0, 2.0, 1.0], {"patience": 1}, False),
        ([3.0, 2.0, 2.0], {"patience": 1}, True),
        ([3.0, 2.0, 2.5], {"patience": 2}, False),
        ([3.0, 2.0, 2.5, 2.25], {"patience": 2}, True),
        ([3.0, 2.0, 2.5, 1.5, 1.75], {"patience": 2}, False),
        ([3.0, 2.75, 2.5], {"patience": 2, "min_improvement": 0.5}, False),
        ([3.0, 2.75, 2.625], {"patience": 2, "min_improvement": 0.5}, True),
        ([3.0, 3.5, 3.5, 3.5, 3.5], {}, False),
        ([3.0, math.nan, math.inf], {"patience": 2}, True),
        ([math.nan, 3.0], {"patience": 2}, False),
    ],
)
def test_when_training_ends(losses: list[float], limits: dict[str, float], ended: bool) -> None:
    assert after(losses, **limits).ended_early is ended


def test_the_best_look_is_kept() -> None:
    looks = after([3.0, 2.0, 2.5, 2.25])
    assert (looks.best_loss, looks.best_step, looks.at_step, looks.num_without_improvement) == (2.0, 10, 30, 2)


def test_a_run_without_looks_has_made_none() -> None:
    assert Looks.of_extra({}) == Looks()
    assert Looks().at_step < 0


@pytest.mark.parametrize("looks", [{"best_loss": "low"}, {"patience": 3}, 7])
def test_looks_that_cannot_be_read_are_no_fresh_ones(looks: object) -> None:
    with pytest.raises(IntegrityError, match="looks at the held-out split cannot be read"):
        Looks.of_extra({"looks": looks})
