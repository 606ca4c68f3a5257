"""A manifest by hand, and changes to it."""

from __future__ import annotations

import copy
from typing import Any

from orchestrator.checkpoint.format import KINDS


def fragment(file: int, start: int, length: int, at: int) -> dict[str, Any]:
    """A fragment whose three kinds lie one after the other from byte ``at`` on."""
    return {
        "file": file, "start": start, "length": length,
        "offsets": {kind: at + 4 * length * place for place, kind in enumerate(KINDS)},
    }  # fmt: skip


def document(step: int = 4) -> dict[str, Any]:
    """A manifest of two ranks: a 3 × 5 matrix cut at element 8, a scalar, an empty tensor, a frozen 2 × 3 matrix cut
    at element 2, a buffer and a random state."""
    files = [
        {
            "key": f"rank-{rank:05d}.safetensors", "size_bytes": size,
            "index_key": f"rank-{rank:05d}.index", "index_sha256": "0" * 64,
        }
        for rank, size in enumerate([400, 200])
    ]  # fmt: skip
    frozen = [{"file": 0, "start": 0, "length": 2, "offset": 224}, {"file": 1, "start": 2, "length": 4, "offset": 184}]
    return {
        "format": "headway/checkpoint/1",
        "run_id": "run-1",
        "attempt": 1,
        "group": 1,
        "nonce": "ab",
        "world_size": 2,
        "block_bytes": 65536,
        "created_s": 1.5,
        "state": {
            "step": step, "tokens": 64, "loss": 3.5, "precision": "fp32", "optimizer_step": 4,
            "spec_sha256": "0" * 64, "dataset_fingerprint": "f",
        },
        "files": files,
        "parameters": {
            "w": {"shape": [3, 5], "fragments": [fragment(0, 0, 8, 96), fragment(1, 8, 7, 100)]},
            "scale": {"shape": [], "fragments": [fragment(0, 0, 1, 200)]},
            "nothing": {"shape": [0, 4], "fragments": []},
        },
        "frozen": {"emb": {"dtype": "BF16", "shape": [2, 3], "fragments": frozen}},
        "buffers": {"count": {"dtype": "I64", "shape": [2], "file": 0, "offset": 384, "size_bytes": 16}},
        "random": {"1/torch": {"dtype": "U8", "shape": [8], "file": 1, "offset": 192, "size_bytes": 8}},
    }  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``, or without it where ``new`` is "delete", if there is such a place still."""
    if not path:
        return new
    try:
        if new == "delete" and len(path) == 1:
            del value[path[0]]
        else:
            value[path[0]] = put(value[path[0]], path[1:], new)
    except (KeyError, IndexError, TypeError):
        pass
    return value


def changed(changes: list[tuple[tuple[Any, ...], Any]], of: Any) -> Any:
    found = copy.deepcopy(of)
    for path, value in changes:
        found = put(found, path, value)
    return found
