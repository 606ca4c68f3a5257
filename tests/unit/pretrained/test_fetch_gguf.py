"""A weight that was a quantised one is stored as it was, in no more bytes than that takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workloads.fetch_gguf import _is_lack_of_memory, narrow

BRAIN = torch.tensor([1.0, -(2.0**120), 2.0**-100])
HALF = torch.tensor([1.0 + 2.0**-10, 2.0**-24])
WIDE = torch.tensor([1.0 + 2.0**-20, 2.0])


def model_of(**weights: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, values in weights.items():
        model.register_parameter(name, nn.Parameter(values.clone()))
    return model


@pytest.mark.parametrize(
    ("weights", "dtypes", "widest"),
    [
        ({"a": BRAIN}, {"a": torch.bfloat16}, torch.bfloat16),
        ({"a": BRAIN, "b": HALF}, {"a": torch.bfloat16, "b": torch.float16}, torch.float16),
        ({"a": WIDE, "b": BRAIN}, {"a": torch.float32, "b": torch.bfloat16}, torch.float32),
        ({"a": torch.cat([BRAIN, HALF])}, {"a": torch.float32}, torch.float32),
    ],
)
def test_each_weight_gets_the_narrowest_dtype_that_holds_it(
    weights: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype], widest: torch.dtype
) -> None:
    model = model_of(**weights)
    assert narrow(model) == widest
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtypes[name]
        assert torch.equal(parameter.float(), weights[name])


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    narrow(model)
    assert model[1].weight is model[0].weight


def test_what_torch_says_of_an_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert _is_lack_of_memory(caught.value)
    assert not _is_lack_of_memory(RuntimeError("the file is cut"))
