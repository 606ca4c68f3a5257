"""Whether a version fits beside those that are loaded. An estimate: what else a request takes is in the headroom."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch

from orchestrator.errors import EnvironmentUnusable
from workloads.serve.batching_memory import available_bytes

_HEADROOM = 1.25
"""Over the weights: activations, key-value caches, and what the allocator loses."""
_NUM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class DoesNotFit(EnvironmentUnusable):
    """A version is too large to be loaded beside what is loaded."""


def needed_bytes(directories: Iterable[Path]) -> int:
    """What the weights of these directories take once loaded, as fp32 on a CPU and as they are stored on a GPU.

    Raises:
        SafetensorError: a file of weights is none.
    """
    as_stored = torch.cuda.is_available()
    total = 0
    for path in (path for directory in directories for path in sorted(directory.glob("*.safetensors"))):
        with safetensors.safe_open(path, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                part = weights.get_slice(name)
                total += math.prod(part.get_shape()) * (_NUM_BYTES.get(part.get_dtype(), 4) if as_stored else 4)
    return math.ceil(total * _HEADROOM)


def free_bytes() -> int:
    """Of the GPU where there is one, else of this machine or container."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of versions that are gone
    return available_bytes(device)


def require_fit(needed: int, *, held: int, available: int, limit: int | None) -> None:
    """
    Args:
        held: what is loaded takes. ``available``: what is free beside it. ``limit``: of all versions together.

    Raises:
        DoesNotFit: and by how much.
    """
    room = available if limit is None else min(available, limit - held)
    if needed > room:
        raise DoesNotFit(f"It needs {needed / 2**20:,.0f} MiB of memory, and {max(0, room) / 2**20:,.0f} MiB are free.")
