from __future__ import annotations

import math

import pytest

from orchestrator.release.canary_policy import (
    CanaryPolicy,
    Promote,
    Reject,
    Seen,
    Wait,
    decide,
    least_excess,
    rate_bounds,
)
from orchestrator.release.channels import Answered

POLICY = CanaryPolicy(window_s=300.0, min_requests=100, max_error_rate_excess=0.01, max_latency_ratio=1.5)


def seen(canary: Answered, stable: Answered, *, age_s: float = 600.0) -> Seen:
    return Seen(age_s=age_s, stable=stable, canary=canary)


def answered(requests: int, errors: int = 0, *, p50_s: float | None = 0.01, p95_s: float | None = 0.02) -> Answered:
    return Answered(requests=requests, errors=errors, p50_s=p50_s, p95_s=p95_s)


STABLE = answered(1000)


@pytest.mark.parametrize(
    ("canary", "stable", "age_s", "kind", "reason"),
    [
        # Patience: nothing, little, too short, nothing to compare with.
        (answered(0), answered(0), 0.0, Wait, "0 requests to the canary and 0 to the stable version; 100 of each"),
        (answered(99), STABLE, 600.0, Wait, "99 requests to the canary"),
        (answered(100), answered(99), 600.0, Wait, "99 to the stable version"),
        (answered(100), STABLE, 299.0, Wait, "Watched for 299 of 300 s"),
        (answered(99), STABLE, 3601.0, Wait, "Too little traffic for 3601 s: promote or roll back by hand"),
        (answered(0), answered(0), 1e6, Wait, "Too little traffic"),
        # Passed.
        (answered(100), STABLE, 300.0, Promote, "It answered 100 requests, 0 of them failed."),
        (answered(200, 2), STABLE, 300.0, Promote, "200 requests, 2 of them failed"),
        (answered(200, 20), answered(1000, 100), 300.0, Promote, "20 of them failed"),  # no worse than the other
        (answered(100, p50_s=0.015, p95_s=0.03), STABLE, 300.0, Promote, ""),
        (answered(100, p50_s=0.001, p95_s=0.001), STABLE, 300.0, Promote, ""),
        (answered(100, p50_s=None, p95_s=None), STABLE, 300.0, Wait, "None of its requests has gone well"),
        (answered(100, 100), answered(100, 100), 300.0, Wait, "None of its requests has gone well"),
        (answered(100), answered(100, p50_s=None, p95_s=None), 300.0, Promote, ""),
        # Errors, few requests: beyond chance or not.
        (answered(1, 1), answered(0), 1.0, Wait, "1 requests to the canary"),
        (answered(2, 2), STABLE, 1.0, Wait, ""),
        (answered(3, 3), STABLE, 1.0, Reject, "It failed 3 of 3 requests, the stable version 0 of 1000."),
        (answered(3, 3), answered(0), 1.0, Reject, ""),
        (answered(20, 3), STABLE, 1.0, Reject, ""),
        (answered(90, 3), STABLE, 1.0, Wait, ""),  # 3 % may be chance
        (answered(20, 3), answered(1000, 150), 1.0, Wait, ""),  # both fail as often
        (answered(3, 3), answered(3, 3), 1.0, Wait, ""),
        # Little to compare with: its own errors, as long as the stable version has none.
        (answered(100, 2), answered(0), 1.0, Wait, ""),
        (answered(100, 2), answered(1), 1.0, Wait, "1 to the stable version"),
        (answered(100, 3), answered(1), 1.0, Wait, ""),
        (answered(100, 10), answered(1), 1.0, Reject, ""),
        (answered(3, 3), answered(1), 1.0, Reject, ""),
        (answered(10, 5), answered(2, 1), 1.0, Wait, ""),
        (answered(20, 10), answered(30, 1), 1.0, Reject, ""),
        # Errors, enough requests.
        (answered(100, 2), STABLE, 1.0, Reject, "It failed 2 of 100 requests"),
        (answered(1000, 10), STABLE, 300.0, Promote, ""),
        (answered(1000, 11), STABLE, 300.0, Reject, ""),
        # Latency: as soon as there are enough requests.
        (
            answered(100, p50_s=0.016),
            STABLE,
            1.0,
            Reject,
            "Its median is 0.016 s a token, 1.6 times that of the stable",
        ),
        (answered(100, p95_s=0.04), STABLE, 1.0, Reject, "Its 95th percentile is 0.04 s a token, 2 times"),
        (answered(99, p50_s=9.0, p95_s=9.0), STABLE, 600.0, Wait, "99 requests to the canary"),
    ],
)
def test_verdicts(canary: Answered, stable: Answered, age_s: float, kind: type, reason: str) -> None:
    verdict = decide(seen(canary, stable, age_s=age_s), policy=POLICY)
    assert type(verdict) is kind
    assert reason in verdict.reason


def test_a_policy_may_ask_for_no_time() -> None:
    policy = CanaryPolicy(window_s=0.0, min_requests=1)
    assert isinstance(decide(seen(answered(1), answered(1), age_s=0.0), policy=policy), Promote)


@pytest.mark.parametrize(
    ("errors", "requests", "bounds"),
    [(0, 10, (0.0, 0.399)), (3, 3, (0.311, 1.0)), (10, 100, (0.046, 0.204)), (1, 1, (0.131, 1.0))],
)
def test_the_bounds_of_a_rate_are_wilsons(errors: int, requests: int, bounds: tuple[float, float]) -> None:
    assert rate_bounds(errors, requests) == pytest.approx(bounds, abs=0.001)


def test_the_least_excess_is_newcombes() -> None:
    """His example (a) of 56 of 70 against 48 of 80, at 95 % there, 0.0524 to 0.3339; wider at 99 %."""
    assert 0.0 < least_excess(answered(70, 56), answered(80, 48)) < 0.0524
    assert least_excess(answered(10, 10), answered(10)) == pytest.approx(1 - math.hypot(0.399, 0.399), abs=0.001)


@pytest.mark.parametrize("field", ["window_s", "max_error_rate_excess", "max_latency_ratio", "max_wait_s"])
def test_limits_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CanaryPolicy.model_validate({field: -1.0})
    with pytest.raises(ValueError, match=field):
        CanaryPolicy.model_validate({field: float("nan")})
