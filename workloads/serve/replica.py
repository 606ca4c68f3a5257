"""One replica: a process that follows the channel, answers, and reports to the decider."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.node_cache import cache_directory
from orchestrator.release.versions import Version
from orchestrator.store import open_store
from workloads.serve import http
from workloads.serve.chat import complete_chat
from workloads.serve.classify import classify
from workloads.serve.completions import complete
from workloads.serve.dispatch import Endpoint, choose, dispatch
from workloads.serve.follow import Follower
from workloads.serve.forward import forward, parts
from workloads.serve.keys import ApiKeys
from workloads.serve.loaded import Loaded
from workloads.serve.loads import Loads
from workloads.serve.models import StoredModels
from workloads.serve.openai_api import ApiError
from workloads.serve.reporter import Reporter
from workloads.serve.reports import ReplicaReport, Reply
from workloads.serve.route import share_key
from workloads.serve.settings import ServeSettings
from workloads.serve.vllm_applications import ServeApplications
from workloads.serve.vllm_engine import VllmModels

DEPLOYMENT = "replica"
ENDPOINTS: Mapping[str, Endpoint] = {"completions": complete, "chat": complete_chat, "classify": classify}
_HOLD_S = 5.0  # the longest that a call stays open which this replica declined
_ANSWER_S = 10.0
"""How long the decider may take over a report."""

logger = logging.getLogger("headway.serve")


class Replica:
    """Answers with the versions that its channel names."""

    def __init__(self, settings: dict[str, Any], decider: Any) -> None:
        """
        Args:
            decider: handle of the decider's deployment.

        Raises:
            EnvironmentUnusable: HEADWAY_API_KEYS holds no digests.
        """
        self._stop = threading.Event()
        self._models: StoredModels | None = None
        gc.freeze()  # what is imported by now is never garbage: to look through it all takes half a second, each time
        self.settings = ServeSettings.model_validate(settings)
        self.keys = ApiKeys.from_environment()
        context = serve.get_replica_context()
        self._own = (DEPLOYMENT, context.app_name)
        self._handle: Any = None
        self._decider = decider
        self.num_forwarded = 0
        replica = context.replica_id.unique_id
        self.reporter = Reporter(report=lambda: self.follower.report(replica), send=self._send)
        self._models = _models(self.settings, application=context.app_name)
        self.follower = Follower(
            channel=self.settings.channel, loads=_loads(self.settings, self._models, self.reporter)
        )
        loops: dict[str, Any] = {"follower": self.follower, "reporter": self.reporter}
        if isinstance(self._models, VllmModels):
            loops["applications"] = self._models
        self._threads = [
            threading.Thread(
                target=each.run, args=(self._stop,), kwargs={"poll_s": self.settings.poll_s}, name=name, daemon=True
            )
            for name, each in loops.items()
        ]
        for thread in self._threads:
            thread.start()
        self.follower.has_looked.wait()  # a replica that takes requests has a version where there is one

    def __del__(self) -> None:
        self._stop.set()
        if isinstance(self._models, VllmModels):
            self._models.close()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        for thread in self._threads:
            if not thread.is_alive():
                raise RuntimeError(f"the thread {thread.name} has ended")

    async def respond(self, kind: str, request: Request) -> Response:
        """The answer to a request of one of :data:`ENDPOINTS`.

        Raises:
            ApiError: what is wrong with the request, or with the server now.
        """
        self.keys.require(request.headers.get("authorization", ""))
        body = await http.read_body(request)
        deadline_s = asyncio.get_running_loop().time() + self.settings.request_timeout_s
        while (chosen := self._choose(body, request.headers)) is None:
            response = await forward(
                self._peers(),
                kind,
                body,
                dict(request.headers),
                deadline_s=deadline_s,
                is_needed=lambda: self.follower.serving.draining,
            )
            if response is not None:
                self.num_forwarded += 1
                return response
        return await dispatch(ENDPOINTS[kind], body, chosen, deadline_s=deadline_s)

    async def forwarded(
        self, kind: str, body: bytes, headers: dict[str, str], left_s: float
    ) -> AsyncGenerator[Any, None]:
        """Another replica's request: whether this one answers it, then :func:`workloads.serve.forward.parts`."""
        try:
            chosen = self._choose(body, headers)
        except ApiError:
            chosen = None
        yield chosen is not None
        if chosen is None:
            await asyncio.sleep(min(_HOLD_S, left_s))  # until the one that asks has found another
            return
        deadline_s = asyncio.get_running_loop().time() + left_s
        try:
            response = await dispatch(ENDPOINTS[kind], body, chosen, deadline_s=deadline_s)
        except ApiError as e:
            response = http.error_response(e)
        async for part in parts(response):
            yield part

    def _peers(self) -> Any:
        """The handle of this application's replicas, made when it is first needed."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._own)
        return self._handle

    def _choose(self, body: bytes, headers: Mapping[str, str]) -> list[Loaded] | None:
        """As :func:`workloads.serve.dispatch.choose`; None while other replicas answer for this one.

        Raises:
            ApiError: 503, nothing is loaded yet, and why.
        """
        serving = self.follower.serving  # looked at once: another state may come between any two looks
        if serving.draining:
            return None
        if serving.stable is None:
            raise self._nothing()
        key = share_key(body, headers, otherwise=secrets.token_hex(8)) if serving.canary is not None else ""
        return choose(serving, key=key)

    def version(self) -> Version:
        """The stable version; while this replica reloads, the one before.

        Raises:
            ApiError: 503, nothing is loaded yet, and why.
        """
        version = self.follower.version
        if version is None:
            raise self._nothing()
        return version

    def _nothing(self) -> ApiError:
        message = why_nothing(self.settings.model, self.follower.problem, self.follower.rejected)
        return ApiError(503, message, kind="server_error", code="no_version")

    def health(self) -> dict[str, Any]:
        follower, serving = self.follower, self.follower.serving
        times = follower.loads.times
        return {
            "status": "ok",
            "model": self.settings.model,
            "channel": self.settings.channel,
            "serving": None if serving.stable is None else serving.stable.version.number,
            "canary": None
            if serving.canary is None
            else {"version": serving.canary.version.number, "weight": serving.weight},
            "num_sequences": sum(loaded.engine.num_sequences for loaded in serving.versions()),
            "loading": follower.loads.loading,
            "tried": follower.loads.tried,
            "rejected": follower.rejected,
            "problem": follower.problem,
            "last_load": None if times is None else asdict(times),
        }

    def _send(self, report: ReplicaReport) -> Reply:
        answer = self._decider.report.remote(report.model_dump(mode="json")).result(timeout_s=_ANSWER_S)
        return Reply.model_validate(answer)


def _models(settings: ServeSettings, *, application: str) -> StoredModels:
    common: dict[str, Any] = {
        "store": open_store(settings.store),
        "cache_directory": cache_directory(),
        "engine": settings.engine_settings(),
        "max_warm_up_s": settings.max_warm_up_s,
    }
    if settings.engine == "transformers":
        return StoredModels(**common)
    return VllmModels(
        **common,
        model=settings.model,
        channel=settings.channel,
        application=application,
        owns=lambda: serve.get_replica_context().rank.rank == 0,  # asked each time: Serve hands ranks on
        vllm=settings.vllm,
        applications=ServeApplications(),
    )


def _loads(settings: ServeSettings, models: StoredModels, reporter: Reporter) -> Loads:
    return Loads(
        store=models.store,
        model=settings.model,
        models=models,
        turns=reporter,
        memory_bytes=settings.memory_bytes,
        drain_s=settings.request_timeout_s,
    )


def why_nothing(model: str, problem: str | None, rejected: Mapping[int, str]) -> str:
    if problem is not None:
        return f"No version of {model} is loaded: {problem}"
    if rejected:
        number, reason = max(rejected.items())
        return f"No version of {model} can serve: version {number} was rejected: {reason}"
    return f"No version released yet for {model}."
