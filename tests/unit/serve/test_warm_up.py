from __future__ import annotations

from typing import Any

import pytest

from tests.unit.serve.scripted import ScriptedEngine
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.warm_up import WARM_UP_TOKENS, TooSlow, warm_up


def test_an_engine_answers_once() -> None:
    engine = ScriptedEngine("a", "b")
    assert warm_up(engine, max_s=60.0) < 60.0
    (asked,) = engine.asked
    assert (asked.prompt, asked.max_tokens, asked.temperature) == (tuple(b"The"), WARM_UP_TOKENS, 0.0)


def test_a_short_context_is_kept() -> None:
    engine = ScriptedEngine("a")
    engine.context_tokens = 5
    warm_up(engine, max_s=60.0)
    assert engine.asked[0].max_tokens == 2


def test_a_broken_model_is_found_out() -> None:
    with pytest.raises(NonFiniteLogits):
        warm_up(ScriptedEngine("a", error=NonFiniteLogits("NaN")), max_s=60.0)


def test_one_that_hangs_is_too_slow() -> None:
    engine = ScriptedEngine("a")
    engine.stall = True
    with pytest.raises(TooSlow, match=r"more than 0\.01 s"):
        warm_up(engine, max_s=0.01)
    assert engine.num_ended == 1


class ScriptedClassifier:
    """Says what it was asked."""

    labels, context_tokens, num_sequences = ("a", "b"), 100, 0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def admit(self, num_sequences: int) -> Any: ...

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def classify(self, texts: Any) -> list[list[float]]:
        self.asked += texts
        return [[0.5, 0.5] for _ in texts]


def test_a_classifier_classifies() -> None:
    classifier = ScriptedClassifier()
    warm_up(classifier, max_s=60.0)
    assert classifier.asked == [list(b"The")]
