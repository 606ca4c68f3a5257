"""How many tokens a batch may hold."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import EnvironmentUnusable
from tests.unit.serve.batches import CONTEXT_TOKENS, make_engine, make_model
from workloads.serve.batching_check import batched
from workloads.serve.batching_memory import available_bytes, default_batch_tokens


@pytest.mark.parametrize(
    ("available", "tokens"),
    [(10**12, 32 * 1000), (4_000_000, 2_000), (2_000_000, 1_000)],
    ids=["as many as can be used", "half of the memory", "one whole context"],
)
def test_half_of_what_is_available(available: int, tokens: int) -> None:
    assert default_batch_tokens(available, bytes_per_token=1000, max_batch=32, context_tokens=1000) == tokens


@pytest.mark.parametrize(("context_tokens", "least"), [(1000, "1,000"), (8000, "1,024")])
def test_too_little_is_said(context_tokens: int, least: str) -> None:
    with pytest.raises(EnvironmentUnusable, match=f"2 MiB .* of 999 tokens at 1,000 bytes each; {least} are the least"):
        default_batch_tokens(1_999_999, bytes_per_token=1000, max_batch=32, context_tokens=context_tokens)


def test_memory_is_seen() -> None:
    assert 2**20 < available_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(("kind", "num_heads"), [("llama", 2), ("gpt2", 4)])
def test_a_tokens_bytes_are_those_of_its_keys_and_values(kind: str, num_heads: int) -> None:
    found = batched(make_model(kind), context_tokens=CONTEXT_TOKENS)
    assert found is not None
    assert found[1] == 2 * 2 * num_heads * 12 * 4  # keys and values, layers, heads, head size, bytes


def test_the_default_is_all_that_the_batch_can_use_where_memory_is_enough() -> None:
    engine = make_engine(make_model("llama"), max_batch=4)
    assert engine._runner._max_batch_tokens == 4 * CONTEXT_TOKENS  # type: ignore[union-attr]
