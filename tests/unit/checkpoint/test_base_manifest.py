"""Manifests that refer to pretrained weights: what they may say, and that others read as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.checkpoint.format import Manifest, parse_manifest
from orchestrator.errors import IntegrityError
from tests.unit.checkpoint.documents import document

Change = Callable[[dict[str, Any]], object]
BASE = {"fingerprint": "0123456789abcdef", "digest": "0" * 64}


def referring() -> dict[str, Any]:
    """``emb`` (2 × 3) lies in the base, with the trained ``w`` (3 × 5) no pair that fits it."""
    found = document()
    found["base"] = dict(BASE)
    found["frozen"]["emb"] = {"dtype": "BF16", "shape": [2, 3], "fragments": [], "base": "wte"}
    return found


def test_a_frozen_parameter_may_lie_in_the_base() -> None:
    manifest = parse_manifest(referring(), source="x")
    assert manifest.frozen["emb"].base == "wte"
    assert parse_manifest(manifest.document(), source="x") == manifest


def test_what_needs_no_base_reads_as_before_and_is_written_as_before() -> None:
    manifest = parse_manifest(document(), source="x")
    written = manifest.document()
    assert "base" not in written
    assert set(written["frozen"]["emb"]) == {"dtype", "shape", "fragments"}
    assert Manifest.model_validate(written) == manifest


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.pop("base"), "frozen emb: it lies in no base, or here too"),
        (lambda d: d["frozen"]["emb"].update(fragments=document()["frozen"]["emb"]["fragments"]), "or here too"),
        (lambda d: d["frozen"]["emb"].pop("base"), "frozen emb: 0 of 6 elements are there"),
        (lambda d: d["base"].update(digest="x"), "base.digest"),
        (lambda d: d["base"].update(fingerprint="../x"), "base.fingerprint"),
        (
            lambda d: d["frozen"]["emb"].update(lora={"a": "w", "b": "gone", "scale": 1.0}),
            "frozen emb: w and gone are no two trained matrices",
        ),
        (
            lambda d: d["frozen"]["emb"].update(lora={"a": "w", "b": "w", "scale": 1.0}),
            r"frozen emb: \(3, 5\) times \(3, 5\) is not \(2, 3\)",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(change: Change, fault: str) -> None:
    lying = referring()
    change(lying)
    with pytest.raises(IntegrityError, match=fault):
        parse_manifest(lying, source="x")
