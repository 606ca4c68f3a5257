"""vLLM as the engine, as far as that goes without it: what it is asked, and what it says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import IntegrityError
from tests.tiny_model import save_model
from tests.unit.serve.applications import MAIN, FakeServe, fetched, load, replica
from workloads.serve.engine import Generation, Piece
from workloads.serve.tokens import Tokens
from workloads.serve.vllm_engine import VllmEngine
from workloads.serve.vllm_events import EngineFailed, completion_arguments, pieces
from workloads.serve.vllm_settings import VllmSettings


def event(text: str, *, reason: str | None = None, count: int | None = None) -> str:
    document: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
    if count is not None:
        document["usage"] = {"completion_tokens": count}
    return f"data: {json.dumps(document)}\n\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", seed=1, with_end=True)


def generate(engine: Any, generation: Generation) -> list[Piece]:
    async def collect() -> list[Piece]:
        return [piece async for piece in engine.generate(generation)]

    return asyncio.run(collect())


def test_a_version_is_an_application_and_its_answers_are_pieces(directory: Path) -> None:
    serve = FakeServe(
        items=[[event("de", count=1), event("f", count=2)], [event("", reason="stop", count=3), "data: [DONE]\n\n"]]
    )
    vllm = VllmSettings(accelerator_type="A10G", engine_kwargs={"max_model_len": 64})
    engine = load(serve, replica(serve, vllm=vllm), directory)
    ((name, arguments, version),) = serve.deployed
    assert name == f"{MAIN}@1"
    assert arguments["model_loading_config"] == {"model_id": "lm", "model_source": str(directory)}
    assert (arguments["accelerator_type"], arguments["engine_kwargs"]) == ("A10G", {"max_model_len": 64})
    assert version == {"store": "s3://memory", "model": "lm", "number": 1}

    found = generate(engine, Generation(prompt=(5, 6), max_tokens=8, seed=3, stop=("x",), end_tokens=(9,)))
    assert [(piece.text, piece.num_tokens, piece.finish_reason) for piece in found] == [
        ("de", 1, None),
        ("f", 2, None),
        ("", 3, "stop"),
    ]
    assert serve.handles == [f"{MAIN}@1"]
    (asked,) = serve.asked
    assert (asked["prompt"], asked["max_tokens"], asked["seed"], asked["stop"]) == ([5, 6], 8, 3, ["x"])
    assert asked["stop_token_ids"] == sorted({9, *Tokens.load(directory).end_tokens})
    assert serve.stream is not None
    assert serve.stream.cancelled


def test_tokens_are_the_versions_own(directory: Path) -> None:
    serve = FakeServe()
    engine = load(serve, replica(serve), directory)
    assert isinstance(engine, VllmEngine)
    ids = asyncio.run(engine.encode("def naïve"))
    assert asyncio.run(engine.decode(ids)) == "def naïve"
    assert asyncio.run(engine.encode("")) == [Tokens.load(directory).begin_token]


def test_what_vllm_does_not_serve(directory: Path) -> None:
    with pytest.raises(IntegrityError, match="adapter alone"):
        replica(FakeServe()).load(fetched(directory, base=directory))
    with pytest.raises(IntegrityError, match="classifies"):
        replica(FakeServe()).load(fetched(directory, task="sequence-classification"))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (SimpleNamespace(error=SimpleNamespace(message="out of blocks")), "out of blocks"),
        (['data: {"error": {"message": "bad"}}\n\n'], "bad"),
        ([event("x", reason="abort")], "a reason of its own: abort"),
        ([3], "int, which is no event"),
    ],
)
def test_errors_of_vllm(item: Any, words: str) -> None:
    with pytest.raises(EngineFailed, match=words):
        list(pieces(item, num_tokens=0))


def test_events_without_usage_count_as_one_token() -> None:
    found = list(pieces([event("a"), event("b", reason="length")], num_tokens=4))
    assert [(piece.num_tokens, piece.finish_reason) for piece in found] == [(5, None), (6, "length")]
    assert list(pieces([": ping\n\n", "data: [DONE]\n\n"], num_tokens=0)) == []


def test_arguments_are_those_of_the_api() -> None:
    generation = Generation(prompt=(1,), max_tokens=2, temperature=0.0, top_p=0.5)
    asked = completion_arguments(generation, model_id="lm", end_tokens=(2, 2))
    assert (asked["temperature"], asked["top_p"], asked["stop_token_ids"]) == (0.0, 0.5, [2])
    assert asked["stream"] is True


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        VllmSettings.model_validate({"replicas": 2})
