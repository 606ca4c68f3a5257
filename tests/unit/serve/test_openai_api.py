from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.serve.completion_api import CompletionRequest, generations, parse_completion
from workloads.serve.openai_api import ApiError


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "lm", "prompt": "x", **fields}).encode())


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("x", ("x",)),
        ("", ("",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["x", [3]], ("x", (3,))),
    ],
)
def test_prompts_of_every_form(prompt: Any, parsed: tuple[Any, ...]) -> None:
    assert parse(prompt=prompt).prompt == parsed


@pytest.mark.parametrize("prompt", [1, {}, [], [None], [1.5], [True], [[1, "x"]], {"a": 1}, ["x"] * 65])
def test_prompts_that_are_none(prompt: Any) -> None:
    assert refusal(prompt=prompt).param == "prompt"


def test_defaults_are_openais() -> None:
    request = parse()
    assert (request.temperature, request.top_p, request.n, request.stop, request.stream) == (1.0, 1.0, 1, (), False)
    assert request.max_tokens is None
    (generation,) = generations(request, [[1]], context_tokens=100, vocab_size=10)
    assert generation.max_tokens == 16
    (generation,) = generations(request, [[1] * 90], context_tokens=100, vocab_size=10)
    assert generation.max_tokens == 10


def test_null_and_neutral_values_ask_for_nothing() -> None:
    asked = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": ""}
    nulls = dict.fromkeys(["logprobs", "max_tokens", "stop", "seed", "temperature", "stream_options", "user"])
    assert parse(**asked, **nulls) == parse()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("n", 0),
        ("n", 9),
        ("n", 1_000_000),
        ("seed", 2**63),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("stop", [1]),
        ("stop", "x" * 1001),
        ("stream", "yes"),
        ("model", 3),
        ("logprobs", 5),
        ("best_of", 2),
        ("logit_bias", {"1": 100}),
        ("frequency_penalty", 0.5),
        ("suffix", "after"),
    ],
)
def test_a_value_outside_its_limit_is_named(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert (error.param or "").startswith(name)
    assert name in str(error)


def test_unknown_and_missing_arguments_are_named() -> None:
    assert str(refusal(max_tokns=3)) == "Unrecognized request argument supplied: max_tokns"
    assert str(refusal(prompt=None)) == "You must provide a prompt parameter."
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(stream=True, stream_options={"x": 1}).status == 400
    assert refusal(prompt=["x"] * 33, n=2).param == "n"


@given(st.binary() | st.text().map(str.encode))
def test_any_body_is_parsed_or_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(body)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = [*CompletionRequest.model_fields, "logit_bias", "best_of"]


@given(st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_values_are_parsed_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "lm", "prompt": "x", **fields}).encode()
    refused = None
    try:
        request = parse_completion(body)
    except ApiError as e:
        refused = e
    if refused is None:
        assert 1 <= len(request.prompt) * request.n <= 64
    else:
        assert refused.status == 400
        json.dumps(refused.document(), allow_nan=False)


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\\ud800", "model": "lm"}', b"[" * 200_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_hostile_bodies(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(body)
    assert caught.value.status == 400


def test_each_sequence_has_a_seed_of_its_own() -> None:
    made = generations(parse(prompt=["x", "y"], n=2, seed=7), [[1], [2]], context_tokens=10, vocab_size=5)
    assert [(generation.prompt, generation.seed) for generation in made] == [
        ((1,), 7),
        ((1,), 8),
        ((2,), 9),
        ((2,), 10),
    ]


@pytest.mark.parametrize(
    ("fields", "prompt", "message"),
    [
        ({}, [1] * 10, "maximum context length is 10 tokens, however you requested 11"),
        ({"max_tokens": 9}, [1, 1], "requested 11 tokens (2 in your prompt; 9 for the completion)"),
        ({}, [], "prompt is empty"),
        ({}, [5], "Token id 5 is outside the vocabulary, 0 … 4"),
        ({}, [-1], "Token id -1"),
    ],
)
def test_what_does_not_fit_the_model(fields: dict[str, Any], prompt: list[int], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        generations(parse(**fields), [prompt], context_tokens=10, vocab_size=5)
    assert message in str(caught.value)
