"""Chat answers by an engine that follows a script."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import Response

from tests.unit.serve.scripted import ScriptedEngine, ask, events
from workloads.serve.chat import complete_chat
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.openai_api import ApiError

HELLO = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
PROMPT = "system: Be short.\nuser: hello\nassistant:"


def answer(engine: ScriptedEngine, **fields: Any) -> tuple[Response, bytes]:
    return ask(complete_chat, engine, {"messages": HELLO, **fields})


def test_a_whole_answer() -> None:
    engine = ScriptedEngine("Hel", "", "lo")
    response, body = answer(engine, n=2, seed=4, stop="x", temperature=0.5)
    document = json.loads(body)
    assert document["object"] == "chat.completion"
    assert document["id"].startswith("chatcmpl-")
    assert [choice["message"] for choice in document["choices"]] == [
        {"role": "assistant", "content": "Hello", "refusal": None}
    ] * 2
    assert [choice["finish_reason"] for choice in document["choices"]] == ["stop", "stop"]
    assert document["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 6,
        "total_tokens": len(PROMPT) + 6,
    }
    assert document["system_fingerprint"] == response.headers["x-headway-version"] == "code-lm@3"
    assert [bytes(asked.prompt).decode() for asked in engine.asked] == [PROMPT] * 2
    assert [asked.seed for asked in engine.asked] == [4, 5]
    assert {(asked.stop, asked.temperature, asked.end_tokens) for asked in engine.asked} == {(("x",), 0.5, (3,))}


def test_a_stream() -> None:
    _, body = answer(ScriptedEngine("Hel", "", "lo"), stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events(body)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert done == "[DONE]"


def test_each_sequence_of_a_stream_says_who_speaks() -> None:
    _, body = answer(ScriptedEngine("a", "b"), stream=True, n=2)
    *chunks, _ = events(body)
    roles = [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"].get("role")) for chunk in chunks]
    assert sorted(roles, key=str) == [(0, "assistant"), (0, None), (1, "assistant"), (1, None)]


def test_it_may_go_on_to_the_end_of_the_context() -> None:
    for fields, max_tokens in (
        ({}, ScriptedEngine.context_tokens - len(PROMPT)),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9}, 9),
    ):
        engine = ScriptedEngine("a")
        answer(engine, **fields)
        assert engine.asked[0].max_tokens == max_tokens


def test_an_answer_without_a_limit_has_the_engines() -> None:
    for fields, max_tokens in (({}, 5), ({"max_tokens": 7}, 7)):
        engine = ScriptedEngine("a")
        engine.default_max_tokens = 5
        answer(engine, **fields)
        assert engine.asked[0].max_tokens == max_tokens


def test_text_may_come_in_parts() -> None:
    engine = ScriptedEngine("a")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer(engine, messages=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}])
    assert bytes(engine.asked[0].prompt).decode() == PROMPT


def test_what_the_client_was_given_may_be_sent_back() -> None:
    engine = ScriptedEngine("a")
    given = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "tool_calls": None}
    answer(engine, messages=[*HELLO, given, {"role": "user", "content": "more"}])
    assert bytes(engine.asked[0].prompt).decode().endswith("assistant: hi\nuser: more\nassistant:")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "wizard"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "tool"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "must provide a messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "only parts of the"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "lone surrogate"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls", "tool_calls"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": "hello"}, "messages", "messages"),
    ({"messages": HELLO * 3}, "messages", "template does not take these messages"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "set one of them"),
    ({"max_tokens": 10_000}, "max_tokens", "maximum context length is 100 tokens"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages", "maximum context length is 100 tokens"),
    ({"n": 9}, "n", "Invalid value for n"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_refusals(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        answer(ScriptedEngine("a"), **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "status", "code"),
    [
        (ScriptedEngine("a", full=True), 429, "rate_limit_exceeded"),
        (ScriptedEngine("a", has_template=False), 400, "no_chat_template"),
        (ScriptedEngine(error=NonFiniteLogits("NaN")), 500, "non_finite_logits"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_the_first_word_has_a_status(
    engine: ScriptedEngine, status: int, code: str, stream: bool
) -> None:
    with pytest.raises(ApiError) as caught:
        answer(engine, stream=stream)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ApiError, match="Unrecognized request argument supplied: mesages"):
        answer(ScriptedEngine("a"), mesages=[])
