"""One rank's file: a layout that stays, aligned, and an equal share of what every rank holds."""

from __future__ import annotations

import struct

import pytest
import safetensors.torch
import torch

from orchestrator.checkpoint.format import DTYPE_BYTES
from orchestrator.checkpoint.image import FileImage, share
from orchestrator.checkpoint.verify import parse_header
from orchestrator.errors import RunError
from tests.unit.checkpoint.saving import FROZEN, SHAPES, fill_frozen, frozen_values
from tests.unit.checkpoint.states import FakeState, random_values


def image() -> tuple[FakeState, FileImage]:
    state = FakeState(SHAPES, frozen_shapes=FROZEN)
    state.fill(random_values(SHAPES))
    fill_frozen(state, frozen_values())
    return state, FileImage(state.fragments(), state.frozen(), whole())


def whole(fill: bool = False) -> dict[str, torch.Tensor]:
    return {"buffer/mask": torch.tensor([True, False, fill]), "buffer/none": torch.zeros(0, 3)}


def test_each_tensor_is_aligned_and_the_header_is_sound() -> None:
    _, file = image()
    (size,) = struct.unpack("<Q", file.data[:8])
    assert size % 8 == 0
    for dtype, start, _ in parse_header(
        bytes(file.data[8 : 8 + size]), file_bytes=file.size_bytes, source="x"
    ).values():
        assert start % DTYPE_BYTES[dtype] == 0


def test_a_snapshot_overwrites_the_one_before_in_place() -> None:
    state, file = image()
    file.snapshot(whole())
    before = bytes(file.data)
    assert torch.equal(safetensors.torch.load(before)["fp32/w"], random_values(SHAPES)["w"]["fp32"])
    state.fill(random_values(SHAPES, seed=1))
    assert bytes(file.data) == before
    file.snapshot(whole(fill=True))
    found = safetensors.torch.load(bytes(file.data))
    assert torch.equal(found["fp32/w"], random_values(SHAPES, seed=1)["w"]["fp32"])
    assert found["buffer/mask"].tolist() == [True, False, True]


def test_a_buffer_of_another_shape_is_refused_by_name() -> None:
    _, file = image()
    with pytest.raises(RunError, match=r"buffer/mask was torch\.bool of shape"):
        file.snapshot({**whole(), "buffer/mask": torch.zeros(4, dtype=torch.bool)})


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_ranks_share_what_all_hold_without_gap_or_overlap(world_size: int) -> None:
    state = FakeState(SHAPES)
    state.fill(random_values(SHAPES))
    parts = [part for rank in range(world_size) for part in share(state.fragments(), rank=rank, world_size=world_size)]
    for name, values in random_values(SHAPES).items():
        mine = sorted((part for part in parts if part.parameter == name), key=lambda part: part.start)
        assert torch.equal(torch.cat([part.tensors["fp32"] for part in mine]), values["fp32"])
        assert [part.start for part in mine] == [sum(p.length for p in mine[:i]) for i in range(len(mine))]
