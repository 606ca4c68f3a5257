"""Conversion rounds as torch does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestrator.checkpoint.convert import convert
from orchestrator.errors import RunError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def converted(values: NDArray[np.generic], stored: str, wanted: str) -> torch.Tensor:
    out = convert(memoryview(values.tobytes()), stored, wanted, name="w")
    return torch.frombuffer(bytearray(out), dtype=DTYPES[wanted])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; of a NaN only that it is one, since torch's own kernels differ in its payload."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    number = ~expected.isnan()
    assert torch.equal(found[number].view(bits), expected[number].view(bits))


def interesting_fp32() -> NDArray[np.uint32]:
    """Each upper half, with lower halves around zero, around the tie and at the end: 65,536 × 9 patterns."""
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=np.uint32)
    return (upper[:, None] | lower[None, :]).ravel()


def test_fp32_to_bf16_rounds_as_torch_does() -> None:
    """Ties, denormals, infinities, the largest, and NaN of every payload that the upper half can hold."""
    bits = interesting_fp32()
    values = torch.from_numpy(bits.view(np.float32).copy())
    assert_same(converted(bits, "F32", "BF16"), values.to(torch.bfloat16))


def test_fp32_to_bf16_rounds_random_bits_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    assert_same(converted(bits, "F32", "BF16"), values.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F808000, 0x3F80),  # a tie goes down to even
        (0x3F818000, 0x3F82),  # and up
        (0x00000001, 0x0000),
        (0x00008001, 0x0001),
        (0x7F7FFFFF, 0x7F80),  # the largest becomes infinity
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),
        (0x80000000, 0x8000),
        (0x7F800001, 0x7FC0),  # a NaN stays one, whatever of its payload is cut off
        (0x7FFFFFFF, 0x7FFF),
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_fp32_to_bf16_by_hand(bits: int, expected: int) -> None:
    out = convert(memoryview(np.array([bits], dtype=np.uint32).tobytes()), "F32", "BF16", name="w")
    assert int.from_bytes(out, "little") == expected


@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_every_16_bit_value_widens_as_torch_does(stored: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16).copy()).view(DTYPES[stored])
    assert_same(converted(bits, stored, "F32"), values.to(torch.float32))


def test_every_fp16_value_becomes_bf16_as_torch_does() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16).copy()).view(torch.float16)
    assert_same(converted(bits, "F16", "BF16"), values.to(torch.float32).to(torch.bfloat16))


def test_fp32_to_fp16_rounds_as_torch_does() -> None:
    bits = interesting_fp32()
    values = bits.view(np.float32)
    bits = bits[~(np.isfinite(values) & (np.abs(values) >= 65520))]
    expected = torch.from_numpy(bits.view(np.float32).copy()).to(torch.float16)
    assert_same(converted(bits, "F32", "F16"), expected)


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e5, 3e38])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_what_fp16_cannot_hold_is_refused_by_name(value: float, stored: str) -> None:
    held = torch.tensor([1.0, value, float("nan"), float("inf")]).to(DTYPES[stored])
    data = memoryview(held.view(torch.uint8).numpy())
    with pytest.raises(RunError) as caught:
        convert(data, stored, "F16", name="layer.0.w")
    assert caught.value.message.startswith(f"layer.0.w holds {abs(float(held[1])):.4g}, more than fp16 can")
    assert "bf16" in caught.value.next_step


def test_the_largest_fp16_infinities_and_nan_are_let_through() -> None:
    values = np.array([65504, 65519.99, -65504, np.inf, -np.inf, np.nan], dtype=np.float32)
    found = converted(values, "F32", "F16")
    assert found[:5].tolist() == [65504, 65504, -65504, float("inf"), float("-inf")]
    assert found[5].isnan()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "I64", "BOOL"])
def test_the_same_dtype_is_passed_through(dtype: str) -> None:
    data = memoryview(b"12345678")
    assert convert(data, dtype, dtype, name="w") is data


@pytest.mark.parametrize("wanted", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
def test_nothing_becomes_nothing(stored: str, wanted: str) -> None:
    assert len(convert(memoryview(b""), stored, wanted, name="w")) == 0
