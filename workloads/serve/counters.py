"""What one version answered: counted while it answers, and read by the metrics and by the decider."""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.release.channels import Answered
from workloads.serve.openai_api import ApiError

BOUNDS_S = tuple(0.001 * 1.2**power for power in range(66))
"""Upper ends of the histograms' buckets, 1 ms to 140 s; one more holds what is above. So close that a quantile is
known to a tenth."""

Outcome = Literal["ok", "failed", "refused", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "failed", "refused", "cancelled")
_Count = Annotated[int, Field(ge=0)]


class Histogram(BaseModel):
    """Durations by bucket, as far up as any fell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    buckets: Annotated[tuple[_Count, ...], Field(max_length=len(BOUNDS_S) + 1)] = ()
    sum_s: float = 0.0

    def __add__(self, other: Histogram) -> Histogram:
        pairs = itertools.zip_longest(self.buckets, other.buckets, fillvalue=0)
        return Histogram(buckets=tuple(a + b for a, b in pairs), sum_s=self.sum_s + other.sum_s)

    def __sub__(self, other: Histogram) -> Histogram:
        """What came since ``other``, an earlier state of the same."""
        pairs = itertools.zip_longest(self.buckets, other.buckets, fillvalue=0)
        return Histogram(buckets=tuple(a - b for a, b in pairs), sum_s=self.sum_s - other.sum_s)

    def quantile(self, share: float) -> float | None:
        """The upper end of the bucket that holds it; None where there is nothing."""
        total = sum(self.buckets)
        for number, below in enumerate(itertools.accumulate(self.buckets)):
            if total and below >= share * total:
                return BOUNDS_S[min(number, len(BOUNDS_S) - 1)]
        return None


class Counts(BaseModel):
    """Totals of one version. Those of several replicas add up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ok: _Count = 0
    failed: _Count = 0
    """By the model: it was broken, failed, or took too long."""
    refused: _Count = 0
    """For what was asked, or because too many were waiting."""
    cancelled: _Count = 0
    """The client went away."""
    tokens: _Count = 0
    request: Histogram = Histogram()
    """Seconds of the requests that went well."""
    first_token: Histogram = Histogram()
    """Seconds from the request to its first token."""
    per_token: Histogram = Histogram()
    """Seconds of a request over the tokens that it gave."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) - getattr(other, name) for name in Counts.model_fields})

    def answered(self) -> Answered:
        """As a canary is judged by. What was refused or cancelled says nothing of the version."""
        return Answered(
            requests=self.ok + self.failed,
            errors=self.failed,
            p50_s=self.per_token.quantile(0.5),
            p95_s=self.per_token.quantile(0.95),
        )


class Counter:
    """The counts of one version in this process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._tokens = 0
        self._request, self._first, self._per_token = _Buckets(), _Buckets(), _Buckets()

    @contextmanager
    def request(self) -> Iterator[Request]:
        """Counts one request by how the block ends."""
        request = Request(begun_s=time.monotonic())
        try:
            yield request
        except ApiError as e:
            self._end("failed" if e.status >= 500 else "refused", request)
            raise
        except BaseException:
            self._end("cancelled", request)
            raise
        self._end("ok", request)

    def add_failure(self) -> None:
        """One more, of a request that was counted as refused, but is refused by this version alone."""
        with self._lock:
            self._outcomes["failed"] += 1

    def counts(self) -> Counts:
        with self._lock:
            return Counts(
                **self._outcomes,
                tokens=self._tokens,
                request=self._request.histogram(),
                first_token=self._first.histogram(),
                per_token=self._per_token.histogram(),
            )

    def _end(self, outcome: Outcome, request: Request) -> None:
        lasted_s = time.monotonic() - request.begun_s
        with self._lock:
            self._outcomes[outcome] += 1
            self._tokens += request.num_tokens
            if request.first_token_s is not None:
                self._first.add(request.first_token_s)
            if outcome == "ok":
                self._request.add(lasted_s)
                self._per_token.add(lasted_s / max(1, request.num_tokens))


@dataclass(kw_only=True)
class Request:
    """One request that is under way."""

    begun_s: float
    num_tokens: int = 0
    first_token_s: float | None = None

    def add_tokens(self, num_tokens: int) -> None:
        """So many more were generated."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.begun_s
        self.num_tokens += num_tokens


class _Buckets:
    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, duration_s: float) -> None:
        self._buckets[bisect.bisect_left(BOUNDS_S, duration_s)] += 1
        self._sum_s += duration_s

    def histogram(self) -> Histogram:
        return Histogram(buckets=_trimmed(self._buckets), sum_s=self._sum_s)


def _trimmed(buckets: Sequence[int]) -> tuple[int, ...]:
    used = next((number for number in range(len(buckets), 0, -1) if buckets[number - 1]), 0)
    return tuple(buckets[:used])
