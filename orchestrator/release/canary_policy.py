"""Whether a canary takes over, from what it and the stable version answered in the same time. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.release.channels import Answered

_Z = 2.576
"""Of a normal distribution: 99 % lie within."""


class CanaryPolicy(BaseModel):
    """When a canary has passed, and when it is rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    window_s: Annotated[float, Field(ge=0.0)] = 300.0
    """The shortest time that a canary is watched before it passes."""
    min_requests: Annotated[int, Field(ge=1)] = 100
    """Answered by each of the two versions, below which none passes or is called too slow."""
    min_errors: Annotated[int, Field(ge=1)] = 3
    """Below so many, none is rejected for its errors before both versions have ``min_requests``."""
    max_error_rate_excess: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """How much the canary's share of failed requests may be above the stable version's."""
    max_latency_ratio: Annotated[float, Field(gt=0.0)] = 1.5
    """The canary's seconds a token over the stable version's, of the median and of the 95th percentile."""
    max_wait_s: Annotated[float, Field(gt=0.0)] = 3600.0
    """After so long with too few requests, the status says that it is waiting for them. It never passes unseen."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Both versions since the canary's start."""

    age_s: float
    stable: Answered
    canary: Answered


@dataclass(frozen=True, kw_only=True)
class Wait:
    reason: str


@dataclass(frozen=True, kw_only=True)
class Promote:
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reject:
    reason: str


Verdict = Wait | Promote | Reject


def decide(seen: Seen, *, policy: CanaryPolicy) -> Verdict:
    """What to do about what was seen."""
    stable, canary = seen.stable, seen.canary
    enough = min(canary.requests, stable.requests) >= policy.min_requests
    excess = _rate(canary) - _rate(stable)
    if (enough and excess > policy.max_error_rate_excess) or _clearly_worse(seen, policy):
        return Reject(
            reason=f"It failed {canary.errors} of {canary.requests} requests, "
            f"the stable version {stable.errors} of {stable.requests}."
        )
    if not enough:
        return Wait(reason=_too_few(seen, policy))
    for name, theirs, its in (("median", stable.p50_s, canary.p50_s), ("95th percentile", stable.p95_s, canary.p95_s)):
        if theirs and its and its > policy.max_latency_ratio * theirs:
            return Reject(
                reason=f"Its {name} is {its:.3g} s a token, {its / theirs:.2g} times that of the stable version; "
                f"the limit is {policy.max_latency_ratio:g}."
            )
    if canary.p50_s is None or canary.errors >= canary.requests:
        return Wait(reason="None of its requests has gone well, so nothing speaks for it.")
    if seen.age_s < policy.window_s:
        return Wait(reason=f"Watched for {seen.age_s:.0f} of {policy.window_s:.0f} s.")
    return Promote(reason=f"It answered {canary.requests} requests, {canary.errors} of them failed.")


def _clearly_worse(seen: Seen, policy: CanaryPolicy) -> bool:
    """Whether the canary's errors exceed the limit beyond chance, however few its requests are.

    As long as the stable version has failed none, however few it answered, the canary's own rate is the excess: what
    fails so often by itself is bad whatever the other would do.
    """
    stable, canary = seen.stable, seen.canary
    if canary.errors < policy.min_errors:
        return False
    least = least_excess(canary, stable) if stable.errors else rate_bounds(canary.errors, canary.requests)[0]
    return least > policy.max_error_rate_excess


def least_excess(canary: Answered, stable: Answered) -> float:
    """The lower end of Newcombe's interval for how much a rate exceeds another, at 99 %. Both answered something.

    Source: Newcombe, "Interval estimation for the difference between independent proportions", Statistics in
    Medicine 17 (1998), method 10.
    """
    low = rate_bounds(canary.errors, canary.requests)[0]
    high = rate_bounds(stable.errors, stable.requests)[1]
    return _rate(canary) - _rate(stable) - math.hypot(_rate(canary) - low, high - _rate(stable))


def rate_bounds(errors: int, requests: int) -> tuple[float, float]:
    """Both ends of Wilson's interval for a rate, at 99 %.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    rate, z2 = errors / requests, _Z * _Z
    middle = rate + z2 / (2 * requests)
    spread = _Z * math.sqrt(rate * (1 - rate) / requests + z2 / (4 * requests * requests))
    return (middle - spread) / (1 + z2 / requests), (middle + spread) / (1 + z2 / requests)


def _rate(answered: Answered) -> float:
    return answered.errors / answered.requests if answered.requests else 0.0


def _too_few(seen: Seen, policy: CanaryPolicy) -> str:
    said = (
        f"{seen.canary.requests} requests to the canary and {seen.stable.requests} to the stable version; "
        f"{policy.min_requests} of each are needed"
    )
    if seen.age_s <= policy.max_wait_s:
        return f"{said}."
    return f"{said}. Too little traffic for {seen.age_s:.0f} s: promote or roll back by hand, or send more."
