"""Rollouts for real: Ray Serve with two replicas and the decider, an S3 server, tiny models, requests all the while."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.release.channels import Canary, ChannelStatus
from orchestrator.store import Store, open_store
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.conftest import BUCKET
from tests.integration.serving import Load, promote, ray_with_serve, replica_pids, status, wait_for
from tests.tiny_model import make_tokenizer, release_version, save_model
from workloads.serve.keys import KEYS_VARIABLE
from workloads.serve.memory import needed_bytes

KEY = "sk-of-the-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}
MODEL = "rollout-lm"
PROMPT = "def __init__(self"
POLL_S = 0.2
CANARY = {"window_s": 1.0, "min_requests": 10, "max_latency_ratio": 50.0}
"""Tiny models on a busy machine: latencies say nothing."""


@pytest.fixture(scope="module")
def serve_port(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, hashlib.sha256(KEY.encode()).hexdigest())
        with ray_with_serve(tmp_path_factory.mktemp("cache")) as port:
            yield port


@dataclass(kw_only=True)
class World:
    """An application, its channel, and what is released to it."""

    store: Store
    model: str
    url: str
    directory: Path
    num_released: int = field(default=0, init=False)

    def release(self, change: Callable[[torch.nn.Module], None] | None = None, *, num_layers: int = 2) -> int:
        """One more version; ``change`` has its weights."""
        self.num_released += 1
        directory = save_model(self.directory / f"{self.model}-{self.num_released}", seed=self.num_released)
        if change is not None or num_layers != 2:
            config = transformers.AutoConfig.from_pretrained(directory, num_hidden_layers=num_layers)
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, config=config)
            if change is not None:
                with torch.no_grad():
                    change(model)
            model.save_pretrained(directory)
        return release_version(self.store, self.model, directory).number

    def load(self) -> Load:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": 8}
        return Load(f"{self.url}/v1/completions", body, num_threads=2, headers=HEADERS)

    def status(self) -> ChannelStatus:
        return status(self.store, self.model)

    def serves(self, version: int, *, replicas: int = 2) -> bool:
        """Whether that is what all replicas answer with."""
        found = [(each.serving, each.canary, each.loading) for each in self.status().replicas]
        return len(found) == replicas and set(found) == {(version, None, None)}


@contextmanager
def deployed(port: int, model: str, directory: Path, **changes: Any) -> Iterator[World]:
    """An application of two replicas, which answer with the first version."""
    from ray import serve

    from workloads.serve.app import build

    store = open_store(f"s3://{BUCKET}/{model}")
    world = World(store=store, model=model, url=f"http://127.0.0.1:{port}/{model}", directory=directory)
    promote(store, model, world.release())
    arguments = {"poll_s": POLL_S, "num_replicas": 2, "canary": CANARY, **changes}
    serve.run(build({"model": model, "store": store.uri, **arguments}), name=model, route_prefix=f"/{model}")
    try:
        wait_for(lambda: world.serves(1))
        yield world
    finally:
        serve.delete(model)


@pytest.fixture(scope="module")
def world(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with deployed(serve_port, MODEL, tmp_path_factory.mktemp("models")) as world:
        yield world


def test_a_key_is_asked_for(world: World) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
    for headers in ({}, {"authorization": "Bearer another"}):
        for path in ("completions", "chat/completions", "classify", "models"):
            method = "GET" if path == "models" else "POST"
            response = httpx.request(method, f"{world.url}/v1/{path}", json=body, headers=headers, timeout=60)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    with (
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="another", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list().data] == [MODEL]
        assert client.completions.create(**body).choices[0].text
    assert httpx.get(f"{world.url}/healthz", timeout=60).json()["serving"] == 1


def test_a_promotion_and_a_rollback_swap_without_a_failed_request(world: World) -> None:
    second = world.release()
    with world.load() as load:
        for version in (second, 1):
            promote(world.store, MODEL, version)
            wait_for(lambda version=version: world.serves(version))
            load.answer_more(10)
            assert set(load.versions[-5:]) == {f"{MODEL}@{version}"}
    assert load.failures == []
    assert world.status().serving == 1


def test_a_canary_gets_its_share_and_takes_over(world: World) -> None:
    good = world.release()
    with world.load() as load:
        num_before = len(load.versions)
        entry = promote(world.store, MODEL, 1, canary=Canary(version=good, weight=0.4))
        wait_for(lambda: world.status().promoted.get(entry) == good)
        seen = load.versions[num_before:]
        wait_for(lambda: world.serves(good))
        load.answer_more(10)
    assert load.failures == []
    assert {f"{MODEL}@1", f"{MODEL}@{good}"} == set(seen)
    assert set(load.versions[-5:]) == {f"{MODEL}@{good}"}
    canary = world.status().canary
    assert canary is not None
    assert (canary.version, canary.phase) == (good, "passed")
    assert min(canary.canary.requests, canary.stable.requests) >= CANARY["min_requests"]


def test_a_canary_that_answers_nan_is_rejected_and_no_client_sees_it(world: World) -> None:
    serving = world.status().serving
    assert serving is not None
    token = make_tokenizer().encode(PROMPT).ids[0]  # so that its first answer, to another prompt, goes well
    bad = world.release(lambda model: model.get_input_embeddings().weight[token].fill_(float("nan")))
    with world.load() as load:
        promote(world.store, MODEL, serving, canary=Canary(version=bad, weight=0.5))
        wait_for(lambda: bad in world.status().rejected)
        wait_for(lambda: world.serves(serving))
        load.answer_more(10)
    assert load.failures == []
    assert set(load.versions) == {f"{MODEL}@{serving}"}
    assert "It failed" in world.status().rejected[bad]
    canary = world.status().canary
    assert canary is not None
    assert (canary.version, canary.phase) == (bad, "rejected")
    found = metrics(world)
    assert found["headway_requests_total", f"{MODEL}@{serving}", "failed"] == 0
    promote(world.store, MODEL, bad)  # stays rejected, whoever names it
    with world.load() as load:
        load.answer_more(20)
    assert set(load.versions) == {f"{MODEL}@{serving}"}


@pytest.mark.full
def test_a_version_that_is_far_too_slow_is_rejected(serve_port: int, tmp_path: Path) -> None:
    """It has six hundred times the layers of the version that answers: on any machine the limit lies between them."""
    with deployed(serve_port, "slow-lm", tmp_path, max_warm_up_s=4.0) as world:
        slow = world.release(num_layers=1200)
        with world.load() as load:
            promote(world.store, world.model, slow)
            wait_for(lambda: slow in world.status().rejected)
            assert "took more than 4 s" in world.status().rejected[slow]
            wait_for(lambda: world.serves(1))
            load.answer_more(10)
        assert load.failures == []
        assert set(load.versions) == {f"{world.model}@1"}


def metrics(world: World) -> dict[tuple[str, str, str], float]:
    """Of whichever replica answers, by name, version and outcome."""
    text = httpx.get(f"{world.url}/metrics", timeout=60).raise_for_status().text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, each.labels.get("version", ""), each.labels.get("outcome", "")): each.value for each in found}


def test_metrics_tell_the_versions_apart(world: World) -> None:
    serving = world.status().serving
    with world.load() as load:
        load.answer_more(10)
    found = metrics(world)
    assert found["headway_requests_total", f"{MODEL}@{serving}", "ok"] > 0
    assert found["headway_generated_tokens_total", f"{MODEL}@{serving}", ""] > 0
    assert found["headway_first_token_seconds_count", f"{MODEL}@{serving}", ""] > 0
    assert found["headway_share", f"{MODEL}@{serving}", ""] == 1


def test_a_replica_that_is_killed_comes_back_to_the_same_version(world: World) -> None:
    serving, before = world.status().serving, {each.id for each in world.status().replicas}
    assert serving is not None
    os.kill(replica_pids(MODEL)[0], signal.SIGKILL)
    wait_for(lambda: any(each.id not in before and each.serving == serving for each in world.status().replicas))
    with world.load() as load:
        load.answer_more(20)
    assert set(load.versions) == {f"{MODEL}@{serving}"}
    wait_for(lambda: world.serves(serving))


def test_where_both_versions_do_not_fit_replicas_reload_by_turns(
    serve_port: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ray import serve

    from workloads.serve.app import build

    store = open_store(f"s3://{BUCKET}/turns")
    url = f"http://127.0.0.1:{serve_port}/turns"
    world = World(store=store, model="turns-lm", url=url, directory=tmp_path_factory.mktemp("turns"))
    for _ in range(3):
        world.release(num_layers=100)  # whose load takes a while
    promote(store, world.model, 1)
    limit = needed_bytes([world.directory / f"{world.model}-1"]) * 3 // 2

    def run(num_replicas: int) -> None:
        arguments = {"poll_s": POLL_S, "num_replicas": num_replicas, "memory_bytes": limit}
        application = build({"model": world.model, "store": store.uri, **arguments})
        serve.run(application, name=world.model, route_prefix="/turns")

    run(1)
    try:
        wait_for(lambda: world.serves(1, replicas=1))
        promote(store, world.model, 2)
        wait_for(lambda: world.status().problem is not None)
        assert f"{world.model}@2 does not fit beside the version that answers" in (world.status().problem or "")
        assert [each.serving for each in world.status().replicas] == [1]  # it may be trying again meanwhile
        run(2)
        wait_for(lambda: world.serves(2))
        with world.load() as load:
            promote(store, world.model, 3)
            wait_for(lambda: world.serves(3))
            load.answer_more(10)
        assert load.failures == []
        passed_on = "headway_forwarded_requests_total", "", ""
        assert any(metrics(world)[passed_on] > 0 for _ in range(20))  # by either of the two, or both
        assert {f"{world.model}@2", f"{world.model}@3"} == set(load.versions)
        assert world.status().rejected == {}
    finally:
        serve.delete(world.model)
