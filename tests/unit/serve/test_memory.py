from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workloads.serve.memory import DoesNotFit, free_bytes, needed_bytes, require_fit

MIB = 2**20


def test_weights_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, 10), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    (tmp_path / "more").mkdir()
    save_file({"a": torch.zeros(6)}, tmp_path / "more" / "two.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    expected = (100 + 4) * 4 if not torch.cuda.is_available() else 100 * 4 + 4 * 2
    assert needed_bytes([tmp_path]) == expected * 5 // 4
    assert needed_bytes([tmp_path, tmp_path / "more"]) == (expected + 24) * 5 // 4


@pytest.mark.parametrize(
    ("needed", "held", "available", "limit", "fits"),
    [
        (10, 0, 10, None, True),
        (11, 0, 10, None, False),
        (10, 50, 10, None, True),  # what is held is not free any more
        (10, 10, 100, 20, True),
        (10, 11, 100, 20, False),
        (10, 0, 9, 20, False),
        (10, 30, 100, 20, False),
    ],
)
def test_what_fits(needed: int, held: int, available: int, limit: int | None, fits: bool) -> None:
    if fits:
        require_fit(needed * MIB, held=held * MIB, available=available * MIB, limit=limit and limit * MIB)
        return
    with pytest.raises(DoesNotFit, match=f"needs {needed} MiB of memory"):
        require_fit(needed * MIB, held=held * MIB, available=available * MIB, limit=limit and limit * MIB)


def test_this_machine_has_memory() -> None:
    assert free_bytes() > 0
