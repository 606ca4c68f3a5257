"""What a replica counted, in Prometheus' text format. Ray's own agents export none of it: one place has it all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from workloads.serve.counters import BOUNDS_S, OUTCOMES, Counter, Counts, Histogram
from workloads.serve.loaded import Serving

CONTENT_TYPE = CONTENT_TYPE_LATEST
_EVERY = 3  # of the counted buckets, so that a scrape stays small


def exposition(
    model: str,
    serving: Serving,
    counters: Mapping[int, Counter],
    *,
    num_forwarded: int = 0,
    rejected: Collection[int] = (),
    has_problem: bool = False,
) -> bytes:
    """
    Args:
        counters: of all versions that this process has loaded, by their number.
        num_forwarded: requests that were passed on to another replica.
        rejected: numbers of versions that do not answer here though an entry may name them.
        has_problem: something keeps a wanted version from serving for now.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(model, serving, counters, num_forwarded))
    registry.register(_States(model, rejected, is_ready=serving.stable is not None, has_problem=has_problem))
    text: bytes = generate_latest(registry)
    return text


class _Collector:
    def __init__(self, model: str, serving: Serving, counters: Mapping[int, Counter], num_forwarded: int) -> None:
        self._serving, self._num_forwarded = serving, num_forwarded
        self._counts = [(f"{model}@{number}", counter.counts()) for number, counter in sorted(counters.items())]

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "headway_requests", "Requests that ended, by how.", labels=["version", "outcome"]
        )
        tokens = CounterMetricFamily("headway_generated_tokens", "Tokens generated.", labels=["version"])
        for version, counts in self._counts:
            tokens.add_metric([version], counts.tokens)
            for outcome in OUTCOMES:
                requests.add_metric([version, outcome], getattr(counts, outcome))
        yield requests
        yield tokens
        yield self._histogram("headway_request_seconds", "Of requests that went well.", "request")
        yield self._histogram("headway_first_token_seconds", "From the request to its first token.", "first_token")
        yield self._histogram("headway_token_seconds", "Of a request, over its tokens.", "per_token")
        yield CounterMetricFamily(
            "headway_forwarded_requests", "Passed on to another replica.", value=self._num_forwarded
        )
        yield from self._gauges()

    def _histogram(self, name: str, text: str, field: str) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["version"])
        for version, counts in self._counts:
            histogram = _part(counts, field)
            family.add_metric([version], _buckets(histogram), sum_value=histogram.sum_s)
        return family

    def _gauges(self) -> Iterable[Metric]:
        sequences = GaugeMetricFamily("headway_sequences", "Admitted now: under way or waiting.", labels=["version"])
        share = GaugeMetricFamily("headway_share", "Of the requests that a version gets.", labels=["version"])
        for loaded in self._serving.versions():
            is_canary = loaded is self._serving.canary
            sequences.add_metric([loaded.version.name], loaded.engine.num_sequences)
            share.add_metric([loaded.version.name], self._serving.weight if is_canary else 1 - self._serving.weight)
        yield sequences
        yield share


class _States:
    """What an alert looks at."""

    def __init__(self, model: str, rejected: Collection[int], *, is_ready: bool, has_problem: bool) -> None:
        self._rejected = [f"{model}@{number}" for number in sorted(rejected)]
        self._is_ready, self._has_problem = is_ready, has_problem

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("headway_ready", "1: a version is loaded and answers.", value=self._is_ready)
        yield GaugeMetricFamily("headway_problem", "1: a wanted version cannot serve now.", value=self._has_problem)
        family = GaugeMetricFamily("headway_rejected", "1: the version was rejected.", labels=["version"])
        for version in self._rejected:
            family.add_metric([version], 1)
        yield family


def _part(counts: Counts, field: str) -> Histogram:
    histogram: Histogram = getattr(counts, field)
    return histogram


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    padded = [*histogram.buckets, *[0] * (len(BOUNDS_S) + 1 - len(histogram.buckets))]
    totals = list(accumulate(padded))
    chosen = [(f"{bound:.4g}", float(below)) for bound, below in zip(BOUNDS_S, totals, strict=False)]
    return [*chosen[_EVERY - 1 :: _EVERY], ("+Inf", float(totals[-1]))]
