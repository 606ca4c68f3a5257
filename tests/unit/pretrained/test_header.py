"""A safetensors file is believed nothing that its bytes do not bear out."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from orchestrator.errors import RunError
from orchestrator.pretrained.header import MAX_HEADER_BYTES, StoredTensor, read_header
from tests.unit.pretrained.directories import safetensors_bytes, save_directory, values


def read(data: bytes) -> dict[str, StoredTensor]:
    return read_header(lambda start, n: data[start : start + n], len(data), source="model.safetensors")


def test_every_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    data = (save_directory(tmp_path) / "model.safetensors").read_bytes()
    found = read(data)
    assert set(found) == set(values())
    for name, tensor in values().items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert data[found[name].offset : found[name].offset + len(raw)] == raw, name
        assert found[name].shape == tuple(tensor.shape)


def entry(dtype: str = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header has 0 bytes, and the file has 0"),
        (b"\x08\x00", "header has 0 bytes, and the file has 2"),
        (struct.pack("<Q", 100) + b"{}", "header has 100 bytes, and the file has 10"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", f"header has {MAX_HEADER_BYTES + 1} bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header has 18446744073709551615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "its header has"),
        (safetensors_bytes(b"not json"), "header is not JSON"),
        (safetensors_bytes(b"\xff\xfe"), "header is not JSON"),
        (safetensors_bytes(b"[" * 20_000), "header is not JSON"),
        (safetensors_bytes([1]), "header is not a JSON object"),
        (safetensors_bytes(b'{"a": {}, "a": {}}'), "a name is there twice"),
        (safetensors_bytes({"a": 3}, b""), "tensor a lacks a dtype"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor a lacks a dtype"),
        (safetensors_bytes({"a": entry(shape=["2"])}, bytes(8)), "tensor a lacks a dtype"),
        (safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)), "tensor a has a shape that cannot be"),
        (safetensors_bytes({"a": entry(shape=[2**63] * 64)}, bytes(8)), "tensor a has a shape that cannot be"),
        (safetensors_bytes({"a": entry(shape=[2**40] * 64)}, bytes(8)), "tensor a, F32"),
        (safetensors_bytes({"a": entry(shape=[1] * 65)}, bytes(8)), "tensor a has a shape that cannot be"),
        (safetensors_bytes({"a": entry(shape=[3])}, bytes(8)), "takes 12 bytes, not"),
        (safetensors_bytes({"a": entry(data_offsets=[0])}, bytes(8)), "takes 8 bytes, not"),
        (safetensors_bytes({"a": entry(data_offsets=[8, 0])}, bytes(8)), "takes 8 bytes, not"),
        (safetensors_bytes({"a": entry(data_offsets=[8, 16])}, bytes(16)), "begins at byte"),
        (safetensors_bytes({"a": entry(data_offsets=[-8, 0])}, bytes(8)), "begins at byte"),
        (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "tensor b begins at byte"),
        (safetensors_bytes({"a": entry()}, bytes(7)), "tensors end at byte"),
        (safetensors_bytes({"a": entry()}, bytes(9)), "tensors end at byte"),
    ],
)
def test_a_header_that_lies_is_one_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(
        RunError, match=r"model.pretrained: model.safetensors is not a sound safetensors file"
    ) as caught:
        read(data)
    assert message in caught.value.message
    assert "Fetch it again" in caught.value.next_step


def test_a_dtype_that_cannot_be_trained_from_is_named() -> None:
    with pytest.raises(RunError, match="tensor a has dtype F8_E4M3, which cannot be trained from"):
        read(safetensors_bytes({"a": entry("F8_E4M3", [8])}, bytes(8)))


@settings(max_examples=200, derandomize=True)
@given(data=st.data())
def test_no_damage_to_a_header_leads_outside_the_file(data: st.DataObject) -> None:
    sound = save({"a": torch.arange(6.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16)})
    place = data.draw(st.integers(0, len(sound) - 37))
    bad = sound[:place] + bytes([data.draw(st.integers(0, 255))]) + sound[place + 1 :]
    try:
        found = read(bad)
    except RunError:
        return
    assert all(0 <= tensor.offset <= len(bad) for tensor in found.values())
    assert sum(torch.empty(t.shape).numel() * {"F32": 4, "BF16": 2}.get(t.dtype, 2) for t in found.values()) <= len(bad)
