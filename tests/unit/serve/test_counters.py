from __future__ import annotations

import pytest

from workloads.serve.counters import BOUNDS_S, Counter, Counts, Histogram
from workloads.serve.openai_api import ApiError


def test_requests_are_counted_by_how_they_end() -> None:
    counter = Counter()
    with counter.request() as request:
        for _ in range(3):
            request.add_tokens(1)
    for error in (ApiError(500, ""), ApiError(504, ""), ApiError(400, ""), ApiError(429, ""), GeneratorExit()):
        with pytest.raises(type(error)), counter.request():
            raise error
    counts = counter.counts()
    assert (counts.ok, counts.failed, counts.refused, counts.cancelled, counts.tokens) == (1, 2, 2, 1, 3)
    assert sum(counts.request.buckets) == sum(counts.per_token.buckets) == sum(counts.first_token.buckets) == 1
    assert (counts.answered().requests, counts.answered().errors) == (3, 2)
    counter.add_failure()
    assert counter.counts().answered().errors == 3


def test_counts_add_up_and_are_taken_apart() -> None:
    counter = Counter()
    with counter.request():
        pass
    one = counter.counts()
    with pytest.raises(ApiError), counter.request():
        raise ApiError(500, "")
    both = counter.counts()
    assert both - one == Counts(failed=1, request=both.request - one.request, per_token=both.request - one.request)
    assert sum((both - one).request.buckets) == 0
    assert (one + both).ok == 2
    assert one + Counts() == one


def test_quantiles_are_the_upper_ends_of_buckets() -> None:
    assert Histogram().quantile(0.5) is None
    histogram = Histogram(buckets=(1, 0, 8, 1))
    assert [histogram.quantile(share) for share in (0.05, 0.5, 0.9, 0.95)] == [
        BOUNDS_S[0],
        BOUNDS_S[2],
        BOUNDS_S[2],
        BOUNDS_S[3],
    ]
    longest = Histogram(buckets=(0,) * len(BOUNDS_S) + (1,))
    assert longest.quantile(0.5) == BOUNDS_S[-1] > 100


def test_counts_survive_the_way_to_the_decider() -> None:
    counter = Counter()
    with counter.request():
        pass
    assert Counts.model_validate(counter.counts().model_dump(mode="json")) == counter.counts()
