"""The learning rate at its edges, and its shape in between."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule import learning_rate
from orchestrator.spec import OptimizerSpec

SCHEDULES = ("constant", "linear", "cosine")


def _optimizer(schedule: str, warmup_steps: int = 10) -> OptimizerSpec:
    return OptimizerSpec.model_validate(
        {
            "learning_rate": 1.0,
            "warmup_steps": warmup_steps,
            "schedule": schedule,
            "min_learning_rate_ratio": 0.1,
        }
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_climbs_from_above_zero_to_the_peak(schedule: str) -> None:
    rates = [learning_rate(_optimizer(schedule), step=step, total_steps=110) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    steps = [after - before for before, after in pairwise(rates)]
    assert steps == pytest.approx([1 / 11] * 10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert learning_rate(_optimizer(schedule, 0), step=0, total_steps=100) == 1.0


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_last_step_and_those_past_it(schedule: str, last: float) -> None:
    for step in (109, 110, 10_000):
        assert learning_rate(_optimizer(schedule), step=step, total_steps=110) == pytest.approx(last)


def test_half_way_down() -> None:
    for schedule in ("linear", "cosine"):
        assert learning_rate(_optimizer(schedule), step=60, total_steps=111) == pytest.approx(0.55)
    quarter = learning_rate(_optimizer("cosine"), step=35, total_steps=111)
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.5**0.5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_too_short_to_decay_keep_the_peak(schedule: str) -> None:
    assert learning_rate(_optimizer(schedule, 0), step=0, total_steps=1) == 1.0
    assert learning_rate(_optimizer(schedule, 4), step=4, total_steps=5) == 1.0


@pytest.mark.parametrize(("step", "total_steps"), [(-1, 100), (0, 10), (0, 0)])
def test_no_such_step(step: int, total_steps: int) -> None:
    with pytest.raises(ValueError, match="no such step"):
        learning_rate(_optimizer("cosine"), step=step, total_steps=total_steps)


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 200),
    step=st.integers(0, 300),
)
def test_stays_within_its_bounds_and_falls_after_the_peak(schedule: str, warmup: int, decay: int, step: int) -> None:
    optimizer = _optimizer(schedule, warmup)
    now, later = (learning_rate(optimizer, step=s, total_steps=warmup + decay) for s in (step, step + 1))
    assert 0 < now <= 1.0
    assert later >= now if step < warmup else later <= now
    assert step < warmup or now >= 0.1 - 1e-12
