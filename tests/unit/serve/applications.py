"""Ray Serve's applications as a stand-in, and replicas that have vLLM generate through it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentUnusable
from orchestrator.release.versions import VersionFile
from tests.tiny_model import make_version
from tests.unit.fakes import MemoryStore
from workloads.serve.admission import EngineSettings
from workloads.serve.models import Fetched
from workloads.serve.vllm_applications import Application, Complete
from workloads.serve.vllm_engine import VllmModels
from workloads.serve.vllm_settings import VllmSettings

MAIN = "headway-lm"


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
class FakeServe:
    """Serve moves on only between two calls, as a test says: whoever waits for it inside of one waits for ever.

    What is deleted goes on as it was until :meth:`end`, since Serve hears of it later.
    """

    there: dict[str, Application] = field(default_factory=lambda: {MAIN: Application(state="RUNNING")})
    deployed: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    """Each time."""
    handles: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    stream: Stream | None = None
    after_look: Callable[[], object] | None = None
    """What happens right after the next look, once."""

    def found(self) -> Mapping[str, Application]:
        found, then, self.after_look = dict(self.there), self.after_look, None
        if then is not None:
            then()
        return found

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        assert name not in self.there, "Serve would replace the replicas of one that is there"
        self.deployed.append((name, arguments, version))
        self.there[name] = Application(state="DEPLOYING")

    def delete(self, name: str) -> None:
        self.deleted.append(name)

    def complete(self, name: str) -> Complete:
        assert self.there[name].state == "RUNNING"
        self.handles.append(name)

        def complete(arguments: dict[str, Any]) -> Stream:
            self.asked.append(arguments)
            self.stream = Stream(self.items)
            return self.stream

        return complete

    def say(self, number: int, state: str, message: str = "") -> None:
        self.there[f"{MAIN}@{number}"] = Application(state=state, message=message)

    def end(self) -> None:
        """What was deleted is gone."""
        for name in self.deleted:
            self.there.pop(name, None)

    @property
    def versions(self) -> list[str]:
        return sorted(name for name in self.there if name != MAIN)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replica(serve: FakeServe, store: MemoryStore | None = None, **changes: Any) -> VllmModels:
    """One that owns, of ``lm``'s channel ``production``."""
    fields: dict[str, Any] = {"owns": lambda: True, "vllm": VllmSettings(), "clock": Clock(), **changes}
    return VllmModels(
        store=store or MemoryStore(),
        cache_directory=Path("/nowhere"),
        engine=EngineSettings(),
        max_warm_up_s=60.0,
        model="lm",
        channel="production",
        application=MAIN,
        applications=serve,
        **fields,
    )


def fetched(directory: Path, number: int = 1, *, task: str = "causal-lm", base: Path | None = None) -> Fetched:
    files = {"config.json": VersionFile(size_bytes=0, sha256="0" * 64)}
    return Fetched(
        version=make_version(model="lm", number=number, files=files, task=task), directory=directory, base=base
    )


def load(serve: FakeServe, models: VllmModels, directory: Path, number: int = 1) -> Any:
    """The way of a version until it runs: one look that asks for it, one that finds it."""
    try:
        models.load(fetched(directory, number))
    except EnvironmentUnusable:
        serve.say(number, "RUNNING")
    return models.load(fetched(directory, number))
