"""Floating-point elements from one dtype to another in numpy, which knows no bf16. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import RunError

FLOATS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The run file's name of a precision, and safetensors' name of the dtype."""


def convert(data: memoryview, stored: str, wanted: str, *, name: str) -> memoryview:
    """The bytes of ``stored`` elements as bytes of ``wanted`` ones, rounded to nearest, ties to even.

    Args:
        stored, wanted: F32, BF16 or F16; any other dtype only as itself.
        name: the tensor's, for the error.

    Raises:
        RunError: a finite value is beyond what F16 can hold.
    """
    if stored == wanted:
        return data
    values = _to_f32(data, stored)
    if wanted == "F32":
        return _bytes(values)
    if wanted == "BF16":
        return _bytes(_round_to_bf16(values))
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    beyond = np.isinf(halves) & np.isfinite(values)
    if np.any(beyond):
        raise RunError(
            f"{name} holds {np.max(np.abs(values[beyond])):.4g}, more than fp16 can: 65504.",
            next_step="Export it as bf16 or fp32.",
        )
    return _bytes(halves)


def _to_f32(data: memoryview, stored: str) -> NDArray[np.float32]:
    if stored == "F32":
        return np.frombuffer(data, dtype=np.float32)
    if stored == "BF16":  # the upper half of an fp32
        return (np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, dtype=np.float16).astype(np.float32)


def _round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    # Half of the last place that stays, less one unless that place is odd: ties go to even.
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    is_nan = np.isnan(values)
    if is_nan.any():  # rounding could carry a NaN over into infinity
        rounded = np.where(is_nan, upper | np.uint32(0x0040), rounded)
    return rounded.astype(np.uint16)


def _bytes(values: NDArray[np.generic]) -> memoryview:
    return memoryview(np.ascontiguousarray(values).view(np.uint8).data)
