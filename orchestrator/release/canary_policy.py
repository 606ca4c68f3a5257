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
    """Below so many, and below ``min_requests``, none is rejected for its errors."""
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
    excess = _rate(canary) - _rate(stable)
    enough = canary.requests >= policy.min_requests
    if (enough and excess > policy.max_error_rate_excess) or _clearly_worse(seen, policy):
        return Reject(
            reason=f"It failed {canary.errors} of {canary.requests} requests, "
            f"the stable version {stable.errors} of {stable.requests}."
        )
    if not enough or stable.requests < policy.min_requests:
        return Wait(reason=_too_few(seen, policy))
    for name, theirs, its in (("median", stable.p50_s, canary.p50_s), ("95th percentile", stable.p95_s, canary.p95_s)):
        if theirs and its and its > policy.max_latency_ratio * theirs:
            return Reject(
                reason=f"Its {name} is {its:.3g} s a token, {its / theirs:.2g} times that of the stable version; "
                f"the limit is {policy.max_latency_ratio:g}."
            )
    if seen.age_s < policy.window_s:
        return Wait(reason=f"Watched for {seen.age_s:.0f} of {policy.window_s:.0f} s.")
    return Promote(reason=f"It answered {canary.requests} requests, {canary.errors} of them failed.")


def _clearly_worse(seen: Seen, policy: CanaryPolicy) -> bool:
    """Whether the canary's errors exceed the limit beyond chance, however few its requests are."""
    canary = seen.canary
    if canary.errors < policy.min_errors:
        return False
    return least_rate(canary.errors, canary.requests) - _rate(seen.stable) > policy.max_error_rate_excess


def least_rate(errors: int, requests: int) -> float:
    """The lower end of Wilson's interval for a rate, at 99 %.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    rate, z2 = errors / requests, _Z * _Z
    spread = _Z * math.sqrt(rate * (1 - rate) / requests + z2 / (4 * requests * requests))
    return (rate + z2 / (2 * requests) - spread) / (1 + z2 / requests)


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
