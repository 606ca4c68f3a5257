"""Generators go on as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.random_state import RandomState


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = RandomState()
    yield
    before.restore()


def drawn() -> list[float]:
    """From each generator, the normal ones too: they keep half of a pair for the next call."""
    return [
        *torch.randn(3).tolist(), torch.rand(()).item(), random.random(), random.gauss(0, 1), random.gauss(0, 1),
        *np.random.standard_normal(3).tolist(), np.random.random(),
    ]  # fmt: skip


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 700])
def test_what_was_captured_is_restored(num_drawn: int) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    for _ in range(num_drawn):
        torch.rand(1)
        random.gauss(0, 1)
        np.random.standard_normal()
    state = RandomState()
    expected = drawn()
    assert drawn() != expected
    state.restore()
    assert drawn() == expected


def test_a_capture_keeps_its_place_in_memory() -> None:
    """The file image copies from the tensors that it was given once."""
    state = RandomState()
    places = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    drawn()
    state.capture()
    expected = drawn()
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == places
    state.restore()
    assert drawn() == expected
