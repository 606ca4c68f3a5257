"""Whether a trained model is good enough to release. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from orchestrator.release.bootstrap import CONFIDENCE, Interval
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
    comparison: Comparison | None = None
    """Both evaluated on the same samples; None where that version cannot be, and what is on record has to do."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two versions' losses on the same held-out samples, in nats per target."""

    mine: float
    theirs: float
    num_blocks: int
    interval: Interval | None
    """Of the difference; None where there are too few samples to say."""


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    passed: bool
    reasons: tuple[str, ...]
    """Why not: each number that fell short, and by how much. Empty where the gate is passed."""


def decide(gate: GateSpec, *, evaluation: Mapping[str, Any], serving: Serving | None) -> GateDecision:
    """Hold an evaluation against the run file's gate and against what serves now.

    Args:
        evaluation: ``loss`` (nats per target), ``perplexity``, ``accuracy``, or what else the task reports.
        serving: the version in force on the channel; None where there is none, which nothing need beat.
    """
    reasons = [
        f"eval {name} is {value}, which is not a finite number"
        for name, value in sorted(evaluation.items())
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if gate.max_loss is not None:
        reasons += _beyond(LOSS, evaluation, gate.max_loss, "gate.max_loss", above=True)
    for name, limit in sorted(gate.max.items()):
        reasons += _beyond(name, evaluation, limit, f"gate.max.{name}", above=True)
    for name, limit in sorted(gate.min.items()):
        reasons += _beyond(name, evaluation, limit, f"gate.min.{name}", above=False)
    if gate.must_beat_serving and serving is not None:
        reasons += _not_better(evaluation, serving)
    return GateDecision(passed=not reasons, reasons=tuple(reasons))


def _beyond(name: str, evaluation: Mapping[str, Any], limit: float, setting: str, *, above: bool) -> list[str]:
    """What is wrong where a figure lies above its limit, or below it; nothing where it does not."""
    value = _number(evaluation, name)
    if value is None and name in evaluation and _is_number(evaluation[name]):
        return []  # it is not finite, which is a reason of its own
    if value is None:
        there = ", ".join(sorted(key for key, figure in evaluation.items() if _is_number(figure))) or "none"
        return [f"the evaluation has no {name} to hold against {setting} {limit:g}; its figures are {there}"]
    excess = value - limit if above else limit - value
    if excess <= 0:
        return []
    return [f"eval {name} {value:.6g} is {'above' if above else 'below'} {setting} {limit:g} by {excess:.4g}"]


def _not_better(evaluation: Mapping[str, Any], serving: Serving) -> list[str]:
    if serving.comparison is not None:
        return _not_surely_better(serving.version, serving.comparison)
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


def _not_surely_better(version: int, found: Comparison) -> list[str]:
    """A lower loss must be lower by more than other samples of the same kind would make it."""
    difference = found.mine - found.theirs
    losses = f"eval loss {found.mine:.6g} does not beat serving version {version}'s {found.theirs:.6g}"
    if difference >= 0:
        return [f"{losses} on the same samples; it is {difference:.4g} higher"]
    if found.interval is None or found.interval.high < 0:
        return []
    return [
        f"{losses} by more than chance: it is {-difference:.4g} lower, and with {CONFIDENCE:.0%} confidence the "
        f"difference lies between {found.interval.low:.4g} and {found.interval.high:+.4g} ({found.num_blocks} blocks)"
    ]


def _number(evaluation: Mapping[str, Any], name: str) -> float | None:
    """The finite number under ``name``, or None."""
    value = evaluation.get(name)
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
