"""peft's names, and what a manifest says of what lies elsewhere."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.adapter import LoraPair, is_replaced, plain_name, saved_name

WRAPPED = {
    "base_model.model.lm.q_proj.base_layer.weight": "lm.q_proj.weight",
    "base_model.model.lm.norm.weight": "lm.norm.weight",
    "base_model.model.score.modules_to_save.default.weight": "score.weight",
    "base_model.model.score.original_module.weight": "score.weight",
    "base_model.model.lm.default.weight": "lm.default.weight",
}
SAVED = {
    "base_model.model.lm.q_proj.lora_A.default.weight": "base_model.model.lm.q_proj.lora_A.weight",
    "base_model.model.score.modules_to_save.default.weight": "base_model.model.score.weight",
}


@pytest.mark.parametrize(("name", "expected"), WRAPPED.items())
def test_the_wrapped_models_own_names(name: str, expected: str) -> None:
    assert plain_name(name) == expected
    assert plain_name(expected) == expected


@pytest.mark.parametrize(("name", "expected"), SAVED.items())
def test_the_names_in_pefts_files(name: str, expected: str) -> None:
    assert saved_name(name) == expected


def test_other_models_names_stay() -> None:
    assert plain_name("net.base_layer.original_module.weight") == "net.base_layer.original_module.weight"
    assert not is_replaced("net.original_module.weight")
    assert is_replaced("base_model.model.score.original_module.weight")


PAIR = LoraPair(a="a", b="b", scale=0.5)


@pytest.mark.parametrize(
    ("pair", "weight", "a", "b"),
    [
        (PAIR, (6, 5), (2, 5), (6, 2)),
        (PAIR.model_copy(update={"transposed": True}), (5, 6), (2, 5), (6, 2)),
    ],
)
def test_a_pair_that_fits(pair: LoraPair, weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    pair.require_fit(weight, a, b)


@pytest.mark.parametrize(
    ("weight", "a", "b", "fault"),
    [
        ((6, 5), (2, 5), None, "no two trained matrices"),
        ((6, 5), (2, 5), (6,), "no two trained matrices"),
        ((5, 6), (2, 5), (6, 2), r"is not \(5, 6\)"),
        ((6, 5), (3, 5), (6, 2), r"is not \(6, 5\)"),
    ],
)
def test_a_pair_that_does_not(
    weight: tuple[int, ...], a: tuple[int, ...] | None, b: tuple[int, ...] | None, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        PAIR.require_fit(weight, a, b)
