"""The Serve application for real: Ray Serve, an S3 server, and the official openai client."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.release import channels
from orchestrator.store import Store, layout, open_store
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.conftest import BUCKET
from tests.integration.serving import Load, promote, ray_with_serve, serving, status, wait_for
from tests.tiny_model import CONTEXT_TOKENS, make_tokenizer, release_version, save_model

MODEL = "code-lm"
CHANNEL = "production"
PROMPT = "def __init__(self"
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Served:
    store: Store
    url: str
    client: openai.OpenAI
    model_1: Path
    """The directory of the first version."""


@pytest.fixture(scope="module")
def serve_port(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with ray_with_serve(tmp_path_factory.mktemp("cache")) as port:
        yield port


@pytest.fixture(scope="module")
def served(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The application on a channel whose first version comes after it was started."""
    from ray import serve

    from workloads.serve.app import build

    store = open_store(f"s3://{BUCKET}/serving")
    started_s = time.monotonic()
    arguments = {
        "model": MODEL,
        "channel": CHANNEL,
        "store": store.uri,
        "poll_s": POLL_S,
        "max_batch": 4,
        "max_queued": 60,
    }
    serve.run(build(arguments), name="tiny", route_prefix="/")
    up_s = time.monotonic() - started_s
    url = f"http://127.0.0.1:{serve_port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT)
    assert caught.value.status_code == 503
    assert "No version released yet" in caught.value.message
    assert client.models.list().data == []

    directory = save_model(tmp_path_factory.mktemp("models") / "one", seed=1)
    promote(store, MODEL, release_version(store, MODEL, directory).number)
    wait_for(lambda: serving(url) == 1)
    client.completions.create(model=MODEL, prompt=PROMPT)
    print(f"\napplication up after {up_s:.1f} s, first answer after {time.monotonic() - started_s:.1f} s")
    yield Served(store=store, url=url, client=client, model_1=directory)
    client.close()


def greedy(directory: Path, prompt: str, num_tokens: int) -> str:
    """What transformers itself generates from the version's directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    text: str = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return text


def test_greedy_output_is_that_of_transformers(served: Served) -> None:
    expected = greedy(served.model_1, PROMPT, 40)
    raw = served.client.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0)
    answer = raw.parse()
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 40
    assert answer.usage.prompt_tokens == len(make_tokenizer().encode(PROMPT).ids)
    assert answer.object == "text_completion"
    assert raw.headers["x-headway-version"] == answer.system_fingerprint == f"{MODEL}@1"


@pytest.mark.parametrize("prompt", ["naïve ca", "漢字", "🙂", "\n\n\t x = [1"])
def test_streamed_pieces_join_to_the_whole(served: Served, prompt: str) -> None:
    whole = served.client.completions.create(model=MODEL, prompt=prompt, max_tokens=60, temperature=0)
    events = list(
        served.client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=60,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert len(events) > 5


def test_a_stream_is_server_sent_events_that_end_in_done(served: Served) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-headway-version"] == f"{MODEL}@1"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list().data] == [MODEL]
    assert served.client.models.retrieve(MODEL).owned_by == "headway"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")


def test_prompts_of_every_form(served: Served) -> None:
    ids = make_tokenizer().encode(PROMPT).ids
    create = served.client.completions.create
    one = create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    assert create(model=MODEL, prompt=ids, max_tokens=8, temperature=0).choices[0].text == one
    several = create(model=MODEL, prompt=[PROMPT, "x"], max_tokens=8, temperature=0, n=2, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [PROMPT + one] * 2
    assert several.choices[2].text.startswith("x")
    assert several.usage.completion_tokens == 32


def test_a_seed_repeats_what_was_sampled(served: Served) -> None:
    def sample(seed: int) -> list[str]:
        answer = served.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, temperature=1.0, top_p=0.95, seed=seed, n=2
        )
        return [choice.text for choice in answer.choices]

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first
    assert first[0] != first[1]


def test_stop_sequences_cut_before_them(served: Served) -> None:
    whole = served.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = whole[7:10]
    events = list(
        served.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True
        )
    )
    assert "".join(event.choices[0].text for event in events) == whole[: whole.index(stop)]
    assert events[-1].choices[0].finish_reason == "stop"


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "does not exist"),
    ({"prompt": "x " * 400}, 400, f"maximum context length is {CONTEXT_TOKENS} tokens"),
    ({"max_tokens": 10_000}, 400, f"maximum context length is {CONTEXT_TOKENS} tokens"),
    ({"prompt": [10**6]}, 400, "outside the vocabulary"),
    ({"logprobs": 3}, 400, "logprobs is not supported"),
    ({"n": 1_000_000}, 400, "Invalid value for n"),
    ({"temperature": 3}, 400, "Invalid value for temperature"),
    ({"max_tokns": 3}, 400, "Unrecognized request argument supplied: max_tokns"),
    ({"prompt": ""}, 400, "prompt is empty"),
    ({"prompt": ["x"] * 60, "n": 2}, 400, "more than 64 completions"),
]


@pytest.mark.parametrize(("change", "status", "message"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_in_openais_format(
    served: Served, change: dict[str, Any], status: int, message: str, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "stream": stream, **change}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        served.client.completions.create(model=MODEL, prompt="x " * 400)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        served.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])


def test_hostile_bodies_and_paths(served: Served) -> None:
    def post(body: bytes) -> httpx.Response:
        return httpx.post(f"{served.url}/v1/completions", content=body, timeout=60)

    assert post(b"x" * (10 * 2**20)).status_code == 413
    for body in (b"", b"\xff\xfe", b"[" * 100_000, b'{"model":', b"[]", b'{"model":"code-lm","prompt":"\\ud800"}'):
        response = post(body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{served.url}/v1/nothing", timeout=60).json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{served.url}/v1/completions", timeout=60).status_code == 405
    assert serving(served.url) == 1


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    body = {"model": MODEL, "prompt": ["x"] * 60, "max_tokens": 120, "temperature": 0}
    num_tokens = counted(served, "headway_generated_tokens_total")
    num_cancelled = counted(served, "headway_requests_total", outcome="cancelled")
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: in_flight(served) == 60)
    connection.close()
    wait_for(lambda: in_flight(served) == 0)
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        next(lines)
        assert in_flight(served) == 60
    wait_for(lambda: counted(served, "headway_requests_total", outcome="cancelled") == num_cancelled + 2)
    assert in_flight(served) == 0
    assert counted(served, "headway_generated_tokens_total") - num_tokens < 60 * 120  # of twice as many


def test_more_than_may_wait_is_429(served: Served) -> None:
    body = {"model": MODEL, "prompt": ["x"] * 60, "max_tokens": 120, "temperature": 0, "stream": True}
    with (
        httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60),
        pytest.raises(openai.RateLimitError),
    ):
        served.client.completions.create(model=MODEL, prompt=["x"] * 10)
    wait_for(lambda: in_flight(served) == 0)


def in_flight(served: Served) -> int:
    num: int = httpx.get(f"{served.url}/healthz", timeout=60).json()["num_sequences"]
    return num


def counted(served: Served, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    text = httpx.get(f"{served.url}/metrics", timeout=60).raise_for_status().text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(each.value for each in found if each.name == name and labels.items() <= each.labels.items())


@pytest.mark.full
def test_promote_reject_and_roll_back_without_a_failed_request(served: Served, tmp_path: Path) -> None:
    store, url = served.store, served.url
    second = release_version(store, MODEL, save_model(tmp_path / "two", seed=2))
    corrupt = release_version(store, MODEL, save_model(tmp_path / "three", seed=3))
    key = layout.version(MODEL, corrupt.number) + "model.safetensors"
    data = bytearray(store.get(key))
    data[-5] ^= 1
    store.upload(key, bytes(data))
    broken = release_version(store, MODEL, broken_model(tmp_path / "four"))

    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10}
    with Load(f"{url}/v1/completions", body) as load:
        wait_for(lambda: len(load.versions) > 2)
        promote(store, MODEL, second.number)
        wait_for(lambda: serving(url) == second.number)
        for bad, reason in ((corrupt, "does not match its recorded digest"), (broken, "not finite")):
            promote(store, MODEL, bad.number)
            wait_for(lambda bad=bad: bad.number in status(store, MODEL).rejected)
            assert reason in status(store, MODEL).rejected[bad.number]
            assert status(store, MODEL).tried == bad.number
            assert serving(url) == second.number
        promote(store, MODEL, 1)
        wait_for(lambda: serving(url) == 1)
        num_before = len(load.versions)
        wait_for(lambda: len(load.versions) > num_before + 2)
    assert load.failures == []
    assert load.versions[0] == load.versions[-1] == f"{MODEL}@1"
    assert set(load.versions) == {f"{MODEL}@1", second.name}
    answer = served.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == greedy(served.model_1, PROMPT, 20)


def broken_model(directory: Path) -> Path:
    """A model that answers NaN."""
    save_model(directory, seed=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    model.save_pretrained(directory)
    return directory


def test_two_replicas_under_a_prefix_follow_another_channel(served: Served) -> None:
    from ray import serve

    from workloads.serve.app import build

    channels.append(served.store, MODEL, "staging", version=1, by="a test", reason="a test")
    arguments = {"model": MODEL, "channel": "staging", "store": served.store.uri, "num_replicas": 2}
    serve.run(build(arguments), name="staging", route_prefix="/staging")
    try:
        url = f"{served.url}/staging"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            texts = {
                client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0).choices[0].text
                for _ in range(8)
            }
        assert texts == {greedy(served.model_1, PROMPT, 20)}
        wait_for(lambda: len(status(served.store, MODEL, "staging").replicas) == 2)
        assert status(served.store, MODEL, "staging").serving == 1
    finally:
        serve.delete("staging")
