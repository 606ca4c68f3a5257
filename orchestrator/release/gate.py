"""Whether a trained model is good enough to release. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec import GateSpec

LOSS = "loss"
BITS_PER_BYTE = "bits_per_byte"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The version to beat."""

    version: int
    evaluation: Mapping[str, Any]
    same_split: bool
    """Whether it was evaluated on the same held-out tokens: the same dataset fingerprint. Losses per token of
    different tokenizers do not compare; bits per byte do."""


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    passed: bool
    reasons: tuple[str, ...]
    """Why not: each number that fell short, and by how much. Empty where the gate is passed."""


def decide(gate: GateSpec, *, evaluation: Mapping[str, Any], serving: Serving | None) -> GateDecision:
    """Hold an evaluation against the run file's gate and against what serves now.

    Args:
        evaluation: ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, or what the task reports.
        serving: the version in force on the channel; None where there is none, which nothing need beat.
    """
    reasons = [
        f"eval {name} is {value}, which is not a finite number"
        for name, value in sorted(evaluation.items())
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if gate.max_loss is not None:
        reasons += _above(LOSS, evaluation, gate.max_loss, "gate.max_loss")
    if gate.must_beat_serving and serving is not None:
        reasons += _not_better(evaluation, serving)
    return GateDecision(passed=not reasons, reasons=tuple(reasons))


def _above(name: str, evaluation: Mapping[str, Any], limit: float, setting: str) -> list[str]:
    value = _number(evaluation, name)
    if value is None:
        return [] if name in evaluation else [f"the evaluation has no {name} to hold against {setting} {limit:g}"]
    if value <= limit:
        return []
    return [f"eval {name} {value:.6g} is above {setting} {limit:g} by {value - limit:.4g}"]


def _not_better(evaluation: Mapping[str, Any], serving: Serving) -> list[str]:
    name = LOSS if serving.same_split else BITS_PER_BYTE
    mine, theirs = _number(evaluation, name), _number(serving.evaluation, name)
    if mine is None:
        return [] if name in evaluation else [f"the evaluation has no {name} to compare with version {serving.version}"]
    if theirs is None:
        return [f"serving version {serving.version} has no {name} on record to compare with"]
    if mine < theirs:
        return []
    return [
        f"eval {name} {mine:.6g} does not beat serving version {serving.version}'s {theirs:.6g}; "
        f"it is {mine - theirs:.4g} higher"
    ]


def _number(evaluation: Mapping[str, Any], name: str) -> float | None:
    """The finite number under ``name``, or None."""
    value = evaluation.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
