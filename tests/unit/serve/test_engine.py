"""The transformers engine on a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from orchestrator.errors import IntegrityError
from tests.tiny_model import CONTEXT_TOKENS, save_model
from workloads.serve.admission import EngineSettings, Overloaded
from workloads.serve.decoding import nucleus
from workloads.serve.engine import Generation, Piece
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.transformers_engine import TransformersEngine

SETTINGS = EngineSettings(max_batch=2, max_queued=2, num_threads=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", seed=1)


@pytest.fixture(scope="module")
def engine(directory: Path) -> TransformersEngine:
    return TransformersEngine.load(directory, SETTINGS)


def run(engine: TransformersEngine, generation: Generation) -> list[Piece]:
    async def collect() -> list[Piece]:
        return [piece async for piece in engine.generate(generation)]

    return asyncio.run(collect())


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_greedy_is_transformers_own(engine: TransformersEngine, directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, engine.vocab_size - 1), min_size=1, max_size=40))
    def check(prompt: list[int]) -> None:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        pieces = run(engine, Generation(prompt=tuple(prompt), max_tokens=24, temperature=0.0))
        assert text(pieces) == asyncio.run(engine.decode(out[0, len(prompt) :].tolist()))
        assert pieces[-1].finish_reason == "length"
        assert pieces[-1].num_tokens == 24

    check()


def test_a_seed_decides_and_requests_do_not_disturb_each_other(engine: TransformersEngine) -> None:
    def wanted(seed: int) -> Generation:
        return Generation(prompt=(5, 6, 7), max_tokens=20, temperature=1.0, seed=seed)

    alone = text(run(engine, wanted(1)))

    async def together() -> list[str]:
        async def one(seed: int) -> str:
            return text([piece async for piece in engine.generate(wanted(seed))])

        return await asyncio.gather(*(one(seed) for seed in (1, 2, 3, 1)))

    results = asyncio.run(together())
    assert results[0] == results[3] == alone
    assert len(set(results)) == 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-5])
def test_a_tiny_temperature_is_greedy(engine: TransformersEngine, temperature: float) -> None:
    prompt = (5, 6, 7)
    cold = run(engine, Generation(prompt=prompt, max_tokens=20, temperature=temperature))
    assert text(cold) == text(run(engine, Generation(prompt=prompt, max_tokens=20, temperature=0.0)))


def test_the_end_token_ends_and_is_not_shown(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, with_end=True)
    weights = load_file(tmp_path / "model.safetensors")
    engine = TransformersEngine.load(tmp_path, SETTINGS)
    (end,) = engine._tokens.end_tokens
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])  # all logits equal: token 0, the end
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine.load(tmp_path, SETTINGS)
    assert end == 0
    assert run(engine, Generation(prompt=(5,), max_tokens=20, temperature=0.0)) == [
        Piece(text="", num_tokens=1, finish_reason="stop")
    ]
    assert asyncio.run(engine.encode("")) == [end]


def test_a_turn_ends_where_the_chat_says(engine: TransformersEngine) -> None:
    """At a token that ends nothing else: the model's config names no end."""
    prompt = (5, 6, 7)
    model: Any = engine._model
    ids = torch.tensor([prompt])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, 3:].tolist()
    at = next(number for number, token in enumerate(said) if number >= 3 and token not in said[:number])
    pieces = run(engine, Generation(prompt=prompt, max_tokens=8, temperature=0.0, end_tokens=(said[at],)))
    assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("stop", at + 1)
    assert text(pieces) == asyncio.run(engine.decode(said[:at]))


def test_closing_stops_the_model(engine: TransformersEngine) -> None:
    async def leave_early() -> None:
        stream = engine.generate(Generation(prompt=(5,), max_tokens=CONTEXT_TOKENS - 1, temperature=0.0))
        async with contextlib.aclosing(stream):
            async for piece in stream:
                assert piece.num_tokens == 1
                break

    asyncio.run(leave_early())
    # Its place is free again.
    assert run(engine, Generation(prompt=(5,), max_tokens=1, temperature=0.0))[-1].finish_reason == "length"


def test_no_more_are_admitted_than_may_wait(engine: TransformersEngine) -> None:
    with engine.admit(3):
        with pytest.raises(Overloaded, match="limit of 4"), engine.admit(2):
            pass
        with engine.admit(1):
            assert engine.num_sequences == 4
    assert engine.num_sequences == 0


def test_nan_logits_are_an_error_and_found_at_load(directory: Path, tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][7, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteLogits):
        TransformersEngine.load(tmp_path, SETTINGS)
    engine = TransformersEngine.load(directory, SETTINGS)
    with torch.no_grad():
        engine._model.lm_head.weight[7, 0] = float("inf")
    with pytest.raises(NonFiniteLogits):
        run(engine, Generation(prompt=(5,), max_tokens=3))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp"):
        TransformersEngine.load(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_that_is_no_model_does_not_load(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, seed=1)
    (tmp_path / name).unlink()
    with pytest.raises((OSError, ValueError, IntegrityError)):
        TransformersEngine.load(tmp_path, SETTINGS)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TransformersEngine.load(tmp_path, SETTINGS)


def test_what_the_directory_recommends_does_not_change_what_is_asked(directory: Path, tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    recommended = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_new_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    wanted = Generation(prompt=(5, 6, 7), max_tokens=20, temperature=0.0)
    plain = TransformersEngine.load(directory, SETTINGS)
    assert text(run(TransformersEngine.load(tmp_path, SETTINGS), wanted)) == text(run(plain, wanted))


def test_nucleus_keeps_the_fewest_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_p, kept in ((0.05, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.95, [0, 1, 2, 3])):
        assert nucleus(probabilities, top_p)[0].nonzero().flatten().tolist() == kept
