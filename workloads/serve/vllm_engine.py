"""The engine that has vLLM generate, in an application of its own for each version.

The replica tokenizes, admits, counts, and holds requests against the canary's share as with its own engine; vLLM gets
token ids and gives text. So channels, canaries and rejections mean the same with both.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import EnvironmentUnusable, HeadwayError, IntegrityError
from orchestrator.release import channels
from orchestrator.release.channels import ChannelEntry, ChannelStatus
from orchestrator.release.versions import Version
from orchestrator.release.wanted import wanted
from orchestrator.store import Store
from workloads.serve.admission import EngineSettings
from workloads.serve.classifier import Classifier
from workloads.serve.engine import Engine, Generation, Piece
from workloads.serve.loading import classifies
from workloads.serve.models import Fetched, StoredModels
from workloads.serve.tokenized import TokenizedEngine
from workloads.serve.tokens import Tokens
from workloads.serve.vllm_applications import DELETING, DEPLOY_FAILED, RUNNING, Application, Applications, Complete
from workloads.serve.vllm_events import completion_arguments, pieces
from workloads.serve.vllm_settings import VllmSettings

logger = logging.getLogger("headway.serve")


class VllmEngine(TokenizedEngine):
    """One version that vLLM generates with."""

    def __init__(self, model_id: str, tokens: Tokens, settings: EngineSettings, complete: Complete) -> None:
        super().__init__(tokens, settings)
        self._model_id, self._complete = model_id, complete

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        arguments = completion_arguments(generation, model_id=self._model_id, end_tokens=self._tokens.end_tokens)
        stream = self._complete(arguments)
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
    """Versions of a store, each in an application of ``ray.serve.llm`` once it is loaded.

    One replica, the owner, makes the applications and takes them away. Which one that is may change at any time.
    """

    model: str
    channel: str
    application: str
    """Serve's name of the application that these belong to; a version's is this one's and ``@N``."""
    owns: Callable[[], bool]
    """Whether this replica is the owner now."""
    vllm: VllmSettings
    applications: Applications
    clock: Callable[[], float] = time.monotonic
    linger_s: float = 60.0
    """How long an application outlives the version's last use: other replicas swap a little later."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    """Between the thread that loads and the one that takes away."""
    _live: dict[str, weakref.WeakSet[VllmEngine]] = field(default_factory=dict, init=False)
    """The engines that are in use, by their application."""
    _used_s: dict[str, float] = field(default_factory=dict, init=False)
    """When each application was last in use, as far as the owner knows."""
    _since_s: dict[str, float] = field(default_factory=dict, init=False)
    """When the owner first found an application that does not run."""
    _going: set[str] = field(default_factory=set, init=False)
    """What the owner has deleted and not yet seen gone: Serve may still call it RUNNING."""

    def needed_bytes(self, fetched: Fetched) -> int:
        """Nothing here: vLLM has GPUs of its own, and waits for them in Ray's queue."""
        return 0

    def load(self, fetched: Fetched) -> Engine | Classifier:
        """Looks once, and waits for nothing: whoever follows the channel goes on doing so, and comes back.

        Raises:
            IntegrityError: vLLM cannot serve this version. EnvironmentUnusable: it does not run yet, or not now.
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
        with self._lock:
            self._used_s[name] = self.clock()  # before the look, so that what it finds is not taken away after it
            self._require_running(name, fetched)
        tokens = Tokens.load(fetched.directory)
        engine = VllmEngine(version.model, tokens, self.engine, self.applications.complete(name))
        with self._lock:
            self._live.setdefault(name, weakref.WeakSet()).add(engine)
        return engine

    def run(self, stop: threading.Event, *, poll_s: float) -> None:
        """Take away what is unused, every ``poll_s`` seconds until ``stop`` is set."""
        problem = None
        while not stop.wait(poll_s):
            try:
                self.take_away()
                problem = None
            except HeadwayError as e:
                if str(e) != problem:
                    logger.warning("No application of a version is taken away for now: %s", e)
                problem = str(e)

    def take_away(self) -> None:
        """Delete the applications that nobody has used for :attr:`linger_s`, whichever replica made them.

        Raises:
            EnvironmentUnusable, IntegrityError: nothing was deleted, since it is not known what is in use.
        """
        if not self.owns():
            with self._lock:
                self._forget()
            return
        names = self._names(self.applications.found())
        # Where all are in use here, which is the usual case, the channel need not be read.
        is_known = all(self._live.get(name) for name in names)
        used = frozenset[int]() if is_known else versions_in_use(self.store, self.model, self.channel)
        now_s = self.clock()
        with self._lock:
            for name, number in names.items():
                if self._live.get(name) or number in used:
                    self._used_s[name] = now_s
                elif now_s - self._used_s.setdefault(name, now_s) >= self.linger_s:
                    logger.info("%s is deleted: nobody uses it.", name)
                    self._delete(name)

    def close(self) -> None:
        """Where the application itself is being deleted, those of all versions go with it, whoever made them."""
        found = self.applications.found()
        if self._ends(found):
            for name in self._names(found):
                self.applications.delete(name)

    def _require_running(self, name: str, fetched: Fetched) -> None:
        """
        Raises:
            as :meth:`load`.
        """
        version, owns = fetched.version, self.owns()
        if not owns:
            self._forget()
        found = self.applications.found()
        if self._ends(found):
            raise EnvironmentUnusable(f"{version.name} is not loaded: {self.application} is being taken away.")
        application = found.get(name)
        if application is None:
            self._begin(name, fetched, owns=owns)
        elif name in self._going or application.state == DELETING:
            if owns:
                self._delete(name)  # once more: the controller may have died over the first
            raise EnvironmentUnusable(f"{version.name} waits until its former application {name} is gone.")
        elif application.state == RUNNING:
            self._since_s.pop(name, None)
        elif application.state == DEPLOY_FAILED:
            self._fail(name, version, application, owns=owns)
        else:
            self._wait(name, version, application, owns=owns)

    def _begin(self, name: str, fetched: Fetched, *, owns: bool) -> None:
        version = fetched.version
        if not owns:
            raise EnvironmentUnusable(f"{version.name} waits for the replica that makes its application {name}.")
        self._going.discard(name)
        self.applications.deploy(name, self._arguments(fetched), self._place(version))
        self._since_s[name] = self.clock()
        raise EnvironmentUnusable(f"{version.name} begins to start under vLLM.")

    def _fail(self, name: str, version: Version, application: Application, *, owns: bool) -> None:
        if owns:
            self._delete(name)
        if application.lacks_something:
            raise EnvironmentUnusable(f"{version.name} could not start under vLLM. {application.said}")
        raise IntegrityError(f"vLLM cannot serve {version.name}. {application.said}")

    def _wait(self, name: str, version: Version, application: Application, *, owns: bool) -> None:
        now_s = self.clock()
        if owns and now_s - self._since_s.setdefault(name, now_s) >= self.vllm.max_start_s:
            self._delete(name)
            raise EnvironmentUnusable(
                f"{version.name} was not ready under vLLM within {self.vllm.max_start_s:g} s, and starts anew. "
                f"{application.said}",
                next_step="Are there free GPUs beside those of the version that serves?",
            )
        raise EnvironmentUnusable(f"{version.name} is still starting under vLLM. {application.said}")

    def _delete(self, name: str) -> None:
        self._going.add(name)
        self._used_s.pop(name, None)
        self._since_s.pop(name, None)
        self.applications.delete(name)

    def _forget(self) -> None:
        """What an owner knows is of no use to one that is not: others act meanwhile."""
        self._used_s.clear()
        self._since_s.clear()
        self._going.clear()

    def _ends(self, found: Mapping[str, Application]) -> bool:
        own = found.get(self.application)
        return own is None or own.state == DELETING

    def _names(self, found: Iterable[str]) -> dict[str, int]:
        """The applications of this one's versions, and whose each is."""
        matches = (re.fullmatch(rf"{re.escape(self.application)}@(\d+)", name) for name in found)
        return {match[0]: int(match[1]) for match in matches if match}

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


def versions_in_use(store: Store, model: str, channel: str) -> frozenset[int]:
    """The versions that the channel wants, that it says serve, and that some replica has or loads by its last report.

    Raises:
        EnvironmentUnusable: the store does not answer. IntegrityError: the status is none.
    """

    def entry(number: int) -> ChannelEntry | None:
        try:
            return channels.read_entry(store, model, channel, number)
        except IntegrityError:
            return None  # passed over by those who follow the channel, too

    status = channels.read_status(store, model, channel) or ChannelStatus()
    numbers = channels.entry_numbers(store, model, channel)
    aim = wanted(numbers, entry, rejected=status.rejected, promoted=status.promoted)
    named = [] if aim is None else [aim.stable, aim.canary]
    if status.serving not in status.rejected:
        named.append(status.serving)
    for replica in status.replicas:
        named += [replica.serving, replica.canary, replica.loading]
    return frozenset(number for number in named if number is not None)
