"""The engine that has vLLM generate, in an application of its own for each version.

The replica tokenizes, admits, counts, and holds requests against the canary's share as with its own engine; vLLM gets
token ids and gives text. So channels, canaries and rejections mean the same with both.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.errors import EnvironmentUnusable, IntegrityError
from orchestrator.release.versions import Version
from workloads.serve.admission import Admission, EngineSettings
from workloads.serve.classifier import Classifier
from workloads.serve.engine import Engine, Generation, Piece
from workloads.serve.loading import classifies
from workloads.serve.models import Fetched, StoredModels
from workloads.serve.tokens import Tokens
from workloads.serve.vllm_events import completion_arguments, pieces
from workloads.serve.vllm_settings import VllmSettings

logger = logging.getLogger("headway.serve")

_POLL_S = 1.0


class Applications(Protocol):
    """Ray Serve, as far as an application for each version needs it."""

    def state(self, name: str) -> str | None:
        """Serve's word for how it is; None where there is none."""
        ...

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        """Without waiting until it runs."""
        ...

    def delete(self, name: str) -> None: ...

    def complete(self, name: str, arguments: dict[str, Any]) -> Any:
        """The stream of one completion: something to be iterated over with ``async for``, and to be cancelled."""
        ...


class ServeApplications:
    """The cluster that this process is part of."""

    def state(self, name: str) -> str | None:
        from ray import serve

        found = serve.status().applications.get(name)
        return None if found is None else str(found.status.value)

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        from ray import serve

        from workloads.serve import vllm_server

        serve.run(vllm_server.build(arguments, version), name=name, route_prefix=None, blocking=False)

    def delete(self, name: str) -> None:
        from ray import serve

        serve.delete(name, _blocking=False)

    def complete(self, name: str, arguments: dict[str, Any]) -> Any:
        from ray import serve
        from ray.serve.llm.openai_api_models import CompletionRequest

        handle = serve.get_app_handle(name).options(stream=True)
        return handle.completions.remote(CompletionRequest(**arguments))


class VllmEngine:
    """One version that vLLM generates with."""

    def __init__(
        self, name: str, model_id: str, tokens: Tokens, settings: EngineSettings, applications: Applications
    ) -> None:
        self._name, self._model_id, self._tokens = name, model_id, tokens
        self._applications = applications
        self._admission = Admission(settings)
        self.context_tokens, self.vocab_size = tokens.context_tokens, tokens.vocab_size
        self.turn_end_tokens = tokens.turn_end_tokens

    @property
    def num_sequences(self) -> int:
        return self._admission.num_sequences

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        return self._admission.admit(num_sequences)

    async def encode(self, text: str) -> list[int]:
        return await self._tokens.encode(text)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await self._tokens.encode_chat(messages)

    async def decode(self, tokens: Sequence[int]) -> str:
        return await self._tokens.decode(tokens)

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        arguments = completion_arguments(generation, model_id=self._model_id, end_tokens=self._tokens.end_tokens)
        stream = self._applications.complete(self._name, arguments)
        num_tokens = 0
        try:
            async for items in stream:
                for piece in pieces(items, num_tokens=num_tokens):
                    num_tokens = piece.num_tokens
                    yield piece
        finally:
            stream.cancel()


@dataclass(frozen=True, kw_only=True)
class VllmModels(StoredModels):
    """Versions of a store, each in an application of ``ray.serve.llm`` once it is loaded."""

    application: str
    """Serve's name of the application that these belong to; a version's is this one's and ``@N``."""
    owns: bool
    """Whether this replica makes the applications and takes them away; the others wait for them."""
    vllm: VllmSettings
    applications: Applications
    sleep: Callable[[float], None] = time.sleep
    linger_s: float = 60.0
    """How long an application outlives the version's last use here: other replicas swap a little later."""
    _live: dict[str, weakref.WeakSet[VllmEngine]] = field(default_factory=dict, init=False)
    """The engines that are in use, by their application."""

    def needed_bytes(self, fetched: Fetched) -> int:
        """Nothing here: vLLM has GPUs of its own, and waits for them in Ray's queue."""
        return 0

    def load(self, fetched: Fetched) -> Engine | Classifier:
        """
        Raises:
            IntegrityError: vLLM cannot serve this version. EnvironmentUnusable: there are no GPUs for it now.
        """
        version = fetched.version
        if fetched.base is not None:
            raise IntegrityError(
                f"{version.name} is an adapter alone, which the vLLM engine does not take.",
                next_step="Export it merged (export.lora: merged).",
            )
        if classifies(version, fetched.directory):
            raise IntegrityError(f"{version.name} classifies texts; the vLLM engine serves models that generate.")
        name = f"{self.application}@{version.number}"
        if self.owns and self.applications.state(name) is None:
            self.applications.deploy(name, self._arguments(fetched), self._place(version))
        self._wait(name, version)
        tokens = Tokens.load(fetched.directory)
        engine = VllmEngine(name, version.model, tokens, self.engine, self.applications)
        self._live.setdefault(name, weakref.WeakSet()).add(engine)
        if self.owns:
            weakref.finalize(engine, self._delete_later, name).atexit = False
        return engine

    def close(self) -> None:
        """Where the application itself is being deleted, those of its versions go with it."""
        if self.owns and self.applications.state(self.application) in (None, "DELETING"):
            for name in self._live:
                self.applications.delete(name)

    def _delete_later(self, name: str) -> None:
        timer = threading.Timer(self.linger_s, self._delete_unused, args=(name,))
        timer.daemon = True
        timer.start()

    def _delete_unused(self, name: str) -> None:
        if not self._live.get(name):  # else the version came back meanwhile
            self._live.pop(name, None)
            self.applications.delete(name)

    def _arguments(self, fetched: Fetched) -> dict[str, Any]:
        """Of ``ray.serve.llm.LLMConfig``."""
        return {
            "model_loading_config": {"model_id": fetched.version.model, "model_source": str(fetched.directory)},
            "engine_kwargs": dict(self.vllm.engine_kwargs),
            "deployment_config": {"num_replicas": self.vllm.num_replicas},
            "accelerator_type": self.vllm.accelerator_type,
        }

    def _place(self, version: Version) -> dict[str, Any]:
        return {"store": self.store.uri, "model": version.model, "number": version.number}

    def _wait(self, name: str, version: Version) -> None:
        waited_s = 0.0
        while (state := self.applications.state(name)) != "RUNNING":
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                self._give_up(name)
                raise IntegrityError(f"vLLM cannot serve {version.name}: Serve says {state} of {name}; see its logs.")
            if waited_s >= self.vllm.max_start_s:
                self._give_up(name)
                raise EnvironmentUnusable(
                    f"{version.name} was not ready under vLLM within {self.vllm.max_start_s:g} s; Serve says {state}.",
                    next_step="Are there free GPUs beside those of the version that serves?",
                )
            self.sleep(_POLL_S)
            waited_s += _POLL_S

    def _give_up(self, name: str) -> None:
        if self.owns:
            self.applications.delete(name)
