"""What every benchmark shares: its closing line, and medians with their spread."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from tests.gloo_ranks import Ranks


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4), "n": len(values)}


def finish(bench: str, figures: dict[str, Any], targets: dict[str, dict[str, Any]]) -> None:
    """Print the one line of JSON that ends a benchmark.

    Args:
        targets: name to ``{"limit", "figure", "met"}``.
    """
    met = all(target["met"] for target in targets.values())
    print(json.dumps({"bench": bench, "figures": figures, "targets": targets, "met": met}))
    if not met:
        raise SystemExit(1)


def at_least(figure: float, limit: float) -> dict[str, Any]:
    return {"limit": f">= {limit}", "figure": round(figure, 4), "met": figure >= limit}


def at_most(figure: float, limit: float) -> dict[str, Any]:
    return {"limit": f"<= {limit}", "figure": round(figure, 4), "met": figure <= limit}


def say(text: str) -> None:
    """Progress, for people; the closing line has standard output to itself."""
    print(text, file=sys.stderr, flush=True)


def bench_ranks(size: int) -> Ranks:
    """Gloo ranks that may take minutes over one call."""
    return Ranks(size, first_port=22800, answer_timeout_s=580.0)
