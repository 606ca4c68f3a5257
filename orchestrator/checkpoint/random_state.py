"""One rank's random generators as tensors, for loops that draw from them.

Headway's own loop does not: it seeds every step from (seed, step, rank), so that random numbers do not depend on
the number of ranks. A loop that is resumed at another size has no state to give to the new ranks either.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """Generators of torch (CPU and this rank's GPU), numpy and Python. ``tensors`` holds what was captured last."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {name: value.clone() for name, value in _captured().items()}

    def capture(self) -> None:
        for name, value in _captured().items():
            self.tensors[name].copy_(value)

    def restore(self) -> None:
        """Set the generators to what ``tensors`` hold."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"])
        version, *words, gauss_next = self.tensors["python"].tolist()
        random.setstate(
            (int(version), tuple(int(word) for word in words), None if np.isnan(gauss_next) else gauss_next)
        )
        *keys, position, has_gauss, cached = self.tensors["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))


def _captured() -> dict[str, Tensor]:
    version, words, gauss_next = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(),
        "python": _doubles([version, *words, float("nan") if gauss_next is None else gauss_next]),
        "numpy": _doubles([*keys, position, has_gauss, cached]),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _doubles(values: list[Any]) -> Tensor:
    """32-bit words and one fraction, all exact in a double."""
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
