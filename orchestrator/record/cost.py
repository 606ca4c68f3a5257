"""What a run cost, by a table of prices. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from orchestrator.record.goodput import HOUR_S, Goodput, Part
from orchestrator.record.model import RunRecord
from orchestrator.target_settings import Prices


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the workers that a run held. The head, storage and traffic are not counted."""

    currency: str
    total: float
    gpu: float
    cpu: float
    by_part: dict[Part, float]
    """Of ``total``, by what the workers did: nothing for parts in which none was held."""


def cost_of(record: RunRecord, goodput: Goodput, prices: Prices) -> Cost | None:
    """A run's cost; None where it trained on a kind of GPU that has no price."""
    resources = record.spec.get("spec", {}).get("resources", {})
    gpu_price = _gpu_price(resources.get("gpu"), record, prices)
    if gpu_price is None:
        return None
    worker_price = gpu_price + prices.cpu_hour * int(resources.get("cpus_per_worker", 1))
    held_s = dict.fromkeys(goodput.seconds, 0.0)
    for segment in goodput.segments:
        held_s[segment.part] += segment.seconds * segment.workers
    by_part = {part: worker_price * seconds / HOUR_S for part, seconds in held_s.items()}
    return Cost(
        currency=prices.currency,
        total=math.fsum(by_part.values()),
        gpu=gpu_price * goodput.gpu_hours,
        cpu=prices.cpu_hour * goodput.cpu_hours,
        by_part=by_part,
    )


def _gpu_price(kind: str | None, record: RunRecord, prices: Prices) -> float | None:
    """An hour of one GPU; 0 where the run has none."""
    if kind is None:
        return 0.0
    if kind != "any":
        return prices.gpu_hour.get(kind.lower())
    devices = {str(event.get("device", "")).lower() for event in record.events_of("training")}
    named = [
        price for name, price in prices.gpu_hour.items() if any(re.search(rf"\b{name}\b", device) for device in devices)
    ]
    return max(named, default=None)
