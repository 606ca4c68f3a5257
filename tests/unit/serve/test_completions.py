"""Answers by an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from tests.tiny_model import make_version
from tests.unit.serve.scripted import FILES, ScriptedEngine, ask, events
from workloads.serve.completions import complete
from workloads.serve.follow import Loaded
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.openai_api import ApiError


def answer(engine: ScriptedEngine, **fields: Any) -> tuple[Response, bytes]:
    return ask(complete, engine, {"prompt": "ab", **fields})


def test_a_whole_answer() -> None:
    response, body = answer(ScriptedEngine("Hel", "", "lo"), n=2)
    document = json.loads(body)
    assert [choice["text"] for choice in document["choices"]] == ["Hello", "Hello"]
    assert [choice["finish_reason"] for choice in document["choices"]] == ["stop", "stop"]
    assert document["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    assert document["system_fingerprint"] == response.headers["x-headway-version"] == "code-lm@3"


def test_a_stream() -> None:
    _, body = answer(ScriptedEngine("Hel", "", "lo"), stream=True, echo=True, stream_options={"include_usage": True})
    *chunks, last, done = events(body)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["ab", "Hel", "lo"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("engine", "status"),
    [
        (ScriptedEngine("a", full=True), 429),
        (ScriptedEngine(error=NonFiniteLogits("NaN")), 500),
        (ScriptedEngine(error=ValueError("secret detail")), 500),
    ],
)
def test_what_fails_before_the_first_word_has_a_status(engine: ScriptedEngine, status: int, stream: bool) -> None:
    with pytest.raises(ApiError) as caught:
        answer(engine, stream=stream)
    assert caught.value.status == status
    assert "secret" not in str(caught.value)


def test_what_fails_later_ends_the_stream_with_an_error() -> None:
    _, body = answer(ScriptedEngine("a", error=NonFiniteLogits("NaN")), stream=True)
    first, error = events(body)
    assert first["choices"][0]["text"] == "a"
    assert error["error"]["code"] == "non_finite_logits"


def test_a_failed_sequence_ends_the_others() -> None:
    engine = ScriptedEngine("a", error=NonFiniteLogits("NaN"))
    with pytest.raises(ApiError):
        answer(engine, n=4)
    assert engine.num_ended == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_model(stream: bool) -> None:
    engine = ScriptedEngine("a", "b", error=ValueError())
    engine.stall = True

    async def run() -> None:
        body = json.dumps({"model": "code-lm", "prompt": "ab", "n": 3, "stream": stream}).encode()
        loaded = Loaded(version=make_version(files=FILES), engine=engine)

        async def consume() -> None:
            response = await complete(body, loaded)
            assert isinstance(response, StreamingResponse)
            async for _ in response.body_iterator:
                pass

        task = asyncio.create_task(consume())
        while engine.num_sequences == 0:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.num_sequences == 0
    assert engine.num_ended == 3


def test_a_client_that_is_gone_before_the_first_byte_leaves_nothing() -> None:
    engine = ScriptedEngine("a", "b", "c")

    async def run() -> None:
        body = json.dumps({"model": "code-lm", "prompt": "ab", "stream": True}).encode()
        response = await complete(body, Loaded(version=make_version(files=FILES), engine=engine))
        assert engine.num_sequences == 1
        del response  # never sent
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.num_sequences == 0

    asyncio.run(run())


def test_another_model_is_404() -> None:
    with pytest.raises(ApiError) as caught:
        answer(ScriptedEngine("a"), model="other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
