"""The manifest of what ranks published has no holes."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.checkpoint.catalog import Folder
from orchestrator.checkpoint.commit import assemble
from orchestrator.checkpoint.format import KINDS, Manifest
from orchestrator.errors import IntegrityError
from tests.unit.checkpoint.saving import SHAPES
from tests.unit.checkpoint.states import scalars

FOLDER = Folder(run_id="run-1", step=4, attempt=3, group=2, nonce="ab")


def published(rank: int, fragments: list[tuple[str, int, int]]) -> dict[str, Any]:
    """What a rank tells of fragments that lie one after the other."""
    described, at = [], 100
    for name, start, length in fragments:
        offsets = {kind: at + 4 * length * place for place, kind in enumerate(KINDS)}
        described.append({"parameter": name, "start": start, "length": length, "offsets": offsets})
        at += 12 * length
    file = {"key": f"r{rank}.safetensors", "size_bytes": 1000, "index_key": f"r{rank}.index", "index_sha256": "0" * 64}
    return {"file": file, "fragments": described, "frozen": [], "whole": {}}


def assembled(*parts: list[tuple[str, int, int]]) -> Manifest:
    ranks = [published(rank, fragments) for rank, fragments in enumerate(parts)]
    return assemble(ranks, folder=FOLDER, shapes=SHAPES, frozen_shapes={}, scalars=scalars(4), created_s=1.0)


def test_fragments_are_in_the_order_of_their_start() -> None:
    manifest = assembled([("w", 20, 15), ("bias", 0, 3)], [("scale", 0, 1), ("w", 0, 20)])
    assert [(f.file, f.start) for f in manifest.parameters["w"].fragments] == [(1, 0), (0, 20)]
    assert (manifest.attempt, manifest.group, manifest.nonce) == (3, 2, "ab")
    assert (manifest.world_size, manifest.run_id, manifest.created_s) == (2, "run-1", 1.0)


def test_holes_and_overlaps_are_refused() -> None:
    rest = [("bias", 0, 3), ("scale", 0, 1)]
    with pytest.raises(IntegrityError, match="w: 20 of 35 elements"):
        assembled([("w", 0, 20), *rest])
    with pytest.raises(IntegrityError, match="missing or given twice"):
        assembled([("w", 0, 20), *rest], [("w", 19, 16)])
