from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.release.gate import Serving, decide
from orchestrator.spec import GateSpec

GOOD = {"loss": 3.0, "perplexity": math.exp(3.0), "bits_per_byte": 1.5}


def serving(*, same_split: bool = True, **evaluation: Any) -> Serving:
    return Serving(version=4, evaluation=evaluation, same_split=same_split)


@pytest.mark.parametrize(
    ("gate", "against", "evaluation", "reason"),
    [
        (GateSpec(), None, GOOD, None),
        (GateSpec(max_loss=3.0), None, GOOD, None),
        (GateSpec(max_loss=2.5), None, GOOD, "eval loss 3 is above gate.max_loss 2.5 by 0.5"),
        (GateSpec(max_loss=2.5), None, {"accuracy": 0.9}, "has no loss to hold against gate.max_loss 2.5; its figures"),
        (GateSpec(min={"accuracy": 0.9}, max={"loss": 3.0}), None, {"accuracy": 0.9, "loss": 3.0}, None),
        (GateSpec(min={"f1": 0.9}), None, {"f1": 0.75}, "eval f1 0.75 is below gate.min.f1 0.9 by 0.15"),
        (
            GateSpec(max={"perplexity": 20.0}),
            None,
            {"perplexity": 20.5},
            "eval perplexity 20.5 is above gate.max.perplexity 20 by 0.5",
        ),
        (GateSpec(min={"margin": -0.5}), None, {"margin": -0.25}, None),
        (
            GateSpec(min={"acuracy": 0.5}),
            None,
            {"accuracy": 0.9, "loss": 0.2},
            "the evaluation has no acuracy to hold against gate.min.acuracy 0.5; its figures are accuracy, loss",
        ),
        (GateSpec(must_beat_serving=True), None, GOOD, None),
        (GateSpec(must_beat_serving=True), serving(loss=3.1), GOOD, None),
        (
            GateSpec(must_beat_serving=True),
            serving(loss=2.75),
            GOOD,
            "eval loss 3 does not beat serving version 4's 2.75; it is 0.25 higher",
        ),
        (GateSpec(must_beat_serving=True), serving(loss=3.0), GOOD, "does not beat"),
        (GateSpec(), serving(loss=1.0), GOOD, None),
        # Another tokenizer: its losses per token do not compare.
        (GateSpec(must_beat_serving=True), serving(same_split=False, loss=1.0, bits_per_byte=1.6), GOOD, None),
        (
            GateSpec(must_beat_serving=True),
            serving(same_split=False, loss=9.0, bits_per_byte=1.25),
            GOOD,
            "eval bits_per_byte 1.5 does not beat serving version 4's 1.25; it is 0.25 higher",
        ),
        (GateSpec(must_beat_serving=True), serving(same_split=False, loss=9.0), GOOD, "no bits_per_byte on record"),
        (GateSpec(must_beat_serving=True), serving(loss=3.5), {"accuracy": 1.0}, "has no loss to compare"),
    ],
)
def test_decisions(gate: GateSpec, against: Serving | None, evaluation: dict[str, float], reason: str | None) -> None:
    decision = decide(gate, evaluation=evaluation, serving=against)
    assert decision.passed == (reason is None)
    if reason is None:
        assert decision.reasons == ()
    else:
        assert len(decision.reasons) == 1
        assert reason in decision.reasons[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "perplexity", "bits_per_byte"])
def test_what_is_not_finite_is_refused_even_by_an_open_gate(name: str, value: float) -> None:
    for gate in (GateSpec(), GateSpec(max_loss=5.0, must_beat_serving=True)):
        decision = decide(gate, evaluation={**GOOD, name: value}, serving=serving(loss=9.0))
        assert decision.reasons == (f"eval {name} is {value}, which is not a finite number",)


def test_all_that_fell_short_is_said() -> None:
    decision = decide(GateSpec(max_loss=2.5, must_beat_serving=True), evaluation=GOOD, serving=serving(loss=2.0))
    assert len(decision.reasons) == 2


def test_a_limited_figure_that_is_not_finite_is_refused_once() -> None:
    gate = GateSpec(min={"f1": 0.5}, max={"f1": 1.0})
    assert decide(gate, evaluation={"f1": math.nan}, serving=None).reasons == (
        "eval f1 is nan, which is not a finite number",
    )


def test_a_truth_value_is_no_figure() -> None:
    (reason,) = decide(GateSpec(min={"good": 0.5}), evaluation={"good": True, "loss": 1.0}, serving=None).reasons
    assert reason.endswith("its figures are loss")


@pytest.mark.parametrize("limit", [math.nan, math.inf, "high"])
def test_limits_are_finite_numbers(limit: object) -> None:
    with pytest.raises(ValueError, match="accuracy"):
        GateSpec.model_validate({"min": {"accuracy": limit}})
