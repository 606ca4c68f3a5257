"""vLLM as the engine, as far as that goes without it: what it is asked, what it says, and its applications' lives."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import EnvironmentUnusable, IntegrityError
from orchestrator.release.versions import VersionFile
from tests.tiny_model import make_version, save_model
from tests.unit.fakes import MemoryStore
from workloads.serve.admission import EngineSettings
from workloads.serve.engine import Generation, Piece
from workloads.serve.models import Fetched
from workloads.serve.tokens import Tokens
from workloads.serve.vllm_engine import VllmEngine, VllmModels
from workloads.serve.vllm_events import EngineFailed, completion_arguments, pieces
from workloads.serve.vllm_settings import VllmSettings

APPLICATION = "headway-lm"


def event(text: str, *, reason: str | None = None, count: int | None = None) -> str:
    document: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
    if count is not None:
        document["usage"] = {"completion_tokens": count}
    return f"data: {json.dumps(document)}\n\n"


class Stream:
    """What a handle's streamed call gives."""

    def __init__(self, items: list[Any]) -> None:
        self._items, self.cancelled = items, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._items:
            yield item

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeApplications:
    """Serve's applications; a deployed one goes through ``states`` and stays at the last."""

    states: list[str] = field(default_factory=lambda: ["DEPLOYING", "RUNNING"])
    there: dict[str, list[str]] = field(default_factory=dict)
    deployed: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    stream: Stream | None = None

    def state(self, name: str) -> str | None:
        left = self.there.get(name)
        if left is None:
            return None
        return left.pop(0) if len(left) > 1 else left[0]

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        self.deployed.append((name, arguments, version))
        self.there[name] = list(self.states)

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        self.there.pop(name, None)

    def complete(self, name: str, arguments: dict[str, Any]) -> Stream:
        assert self.state(name) == "RUNNING"
        self.asked.append(arguments)
        self.stream = Stream(self.items)
        return self.stream


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", seed=1, with_end=True)


def models(applications: FakeApplications, **changes: Any) -> VllmModels:
    return VllmModels(
        store=MemoryStore(),
        cache_directory=Path("/nowhere"),
        engine=EngineSettings(),
        max_warm_up_s=60.0,
        application=APPLICATION,
        applications=applications,
        sleep=lambda _: None,
        linger_s=0.0,
        **{"owns": True, "vllm": VllmSettings(), **changes},
    )


def fetched(directory: Path, *, number: int = 1, task: str = "causal-lm", base: Path | None = None) -> Fetched:
    files = {"config.json": VersionFile(size_bytes=0, sha256="0" * 64)}
    return Fetched(
        version=make_version(model="lm", number=number, files=files, task=task), directory=directory, base=base
    )


def generate(engine: Any, generation: Generation) -> list[Piece]:
    async def collect() -> list[Piece]:
        return [piece async for piece in engine.generate(generation)]

    return asyncio.run(collect())


def test_a_version_is_an_application_and_its_answers_are_pieces(directory: Path) -> None:
    applications = FakeApplications(
        items=[[event("de", count=1), event("f", count=2)], [event("", reason="stop", count=3), "data: [DONE]\n\n"]]
    )
    vllm = VllmSettings(accelerator_type="A10G", engine_kwargs={"max_model_len": 64})
    engine = models(applications, vllm=vllm).load(fetched(directory))
    ((name, arguments, version),) = applications.deployed
    assert name == f"{APPLICATION}@1"
    assert arguments["model_loading_config"] == {"model_id": "lm", "model_source": str(directory)}
    assert (arguments["accelerator_type"], arguments["engine_kwargs"]) == ("A10G", {"max_model_len": 64})
    assert version == {"store": "s3://memory", "model": "lm", "number": 1}

    found = generate(engine, Generation(prompt=(5, 6), max_tokens=8, seed=3, stop=("x",), end_tokens=(9,)))
    assert [(piece.text, piece.num_tokens, piece.finish_reason) for piece in found] == [
        ("de", 1, None),
        ("f", 2, None),
        ("", 3, "stop"),
    ]
    (asked,) = applications.asked
    assert (asked["prompt"], asked["max_tokens"], asked["seed"], asked["stop"]) == ([5, 6], 8, 3, ["x"])
    assert asked["stop_token_ids"] == sorted({9, *Tokens.load(directory).end_tokens})
    assert applications.stream is not None
    assert applications.stream.cancelled


def test_tokens_are_the_versions_own(directory: Path) -> None:
    engine = models(FakeApplications()).load(fetched(directory))
    assert isinstance(engine, VllmEngine)
    ids = asyncio.run(engine.encode("def naïve"))
    assert asyncio.run(engine.decode(ids)) == "def naïve"
    assert asyncio.run(engine.encode("")) == [Tokens.load(directory).begin_token]


def test_replicas_that_do_not_own_wait_for_the_one_that_does(directory: Path) -> None:
    applications = FakeApplications()
    applications.there[f"{APPLICATION}@1"] = ["DEPLOYING", "DEPLOYING", "RUNNING"]
    models(applications, owns=False).load(fetched(directory))
    assert applications.deployed == []


@pytest.mark.parametrize("state", ["DEPLOY_FAILED", "UNHEALTHY"])
def test_a_version_that_vllm_cannot_load_is_rejected(directory: Path, state: str) -> None:
    applications = FakeApplications(states=["DEPLOYING", state])
    with pytest.raises(IntegrityError, match=f"vLLM cannot serve lm@1: Serve says {state}"):
        models(applications).load(fetched(directory))
    assert applications.deleted == [f"{APPLICATION}@1"]


def test_no_free_gpu_is_not_the_versions_fault(directory: Path) -> None:
    applications = FakeApplications(states=["DEPLOYING"])
    with pytest.raises(EnvironmentUnusable, match=r"not ready under vLLM within 3 s; Serve says DEPLOYING.*free GPUs"):
        models(applications, vllm=VllmSettings(max_start_s=3)).load(fetched(directory))
    assert applications.deleted == [f"{APPLICATION}@1"]


def test_what_vllm_does_not_serve(directory: Path) -> None:
    with pytest.raises(IntegrityError, match="adapter alone"):
        models(FakeApplications()).load(fetched(directory, base=directory))
    with pytest.raises(IntegrityError, match="classifies"):
        models(FakeApplications()).load(fetched(directory, task="sequence-classification"))


def test_an_application_ends_with_its_last_use(directory: Path) -> None:
    applications = FakeApplications()
    owner = models(applications)
    engine = owner.load(fetched(directory))
    again = owner.load(fetched(directory))  # a rollback to it, before the first was let go
    assert len(applications.deployed) == 1
    del engine
    gc.collect()
    owner._delete_unused(f"{APPLICATION}@1")
    assert applications.deleted == []
    del again
    gc.collect()
    owner._delete_unused(f"{APPLICATION}@1")
    assert set(applications.deleted) == {f"{APPLICATION}@1"}


@pytest.mark.parametrize(("state", "deleted"), [(["RUNNING"], []), (["DELETING"], [f"{APPLICATION}@1"])])
def test_versions_go_with_the_application_but_not_with_a_replica(
    directory: Path, state: list[str], deleted: list[str]
) -> None:
    applications = FakeApplications()
    owner = models(applications)
    engine = owner.load(fetched(directory))
    applications.there[APPLICATION] = state
    owner.close()
    assert applications.deleted == deleted
    assert engine is not None


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
