"""The Ray Serve application: ``workloads.serve.app:build``. One replica is one process that follows the channel.

Works with Serve's own command line and REST API::

    serve run workloads.serve.app:build model=code-lm channel=production store=s3://bucket/prefix
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator import __version__
from orchestrator.errors import UsageError
from orchestrator.release.channels import ChannelStatus
from orchestrator.release.versions import Version
from orchestrator.store import open_store
from workloads.adapter import download_base
from workloads.serve import http, openai_api
from workloads.serve.admission import EngineSettings
from workloads.serve.chat import complete_chat
from workloads.serve.classifier import Classifier
from workloads.serve.classify import classify
from workloads.serve.completions import complete
from workloads.serve.engine import Engine
from workloads.serve.engines import load_engine
from workloads.serve.follow import Follower, Loaded
from workloads.serve.openai_api import ApiError

CACHE_VARIABLE = "HEADWAY_CACHE"
DEPLOYMENT = "replica"
_MAX_ONGOING = 1000  # above what the engine admits, so that it is the engine that answers 429

logger = logging.getLogger("headway.serve")


class ServeSettings(BaseModel):
    """The application's arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    channel: str = "production"
    headway: str | None = None
    """The version of Headway that asks; another than this one's is refused. Null asks for none."""
    store: str | None = None
    """``s3://bucket/prefix``; null takes HEADWAY_STORE on the replica's node. Credentials come from AWS_…"""
    poll_s: Annotated[float, Field(gt=0.0)] = 2.0
    """Between two looks at the channel."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0.0)] = 0.1
    """What a replica reserves in Ray. Little, so that on a small machine training still finds its CPUs."""
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    max_concurrent: Annotated[int, Field(ge=1)] = EngineSettings.max_concurrent
    max_queued: Annotated[int, Field(ge=0)] = EngineSettings.max_queued
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Of one replica's tensor operations; null takes half of the cores."""

    def engine_settings(self) -> EngineSettings:
        chosen = {} if self.num_threads is None else {"num_threads": self.num_threads}
        return EngineSettings(max_concurrent=self.max_concurrent, max_queued=self.max_queued, **chosen)


def cache_directory() -> Path:
    """Where downloaded versions lie on this node: ``HEADWAY_CACHE``, else ``~/.cache/headway``."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "headway") / "versions"


class _Replica:
    """Answers with the version that its channel names."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = ServeSettings.model_validate(settings)
        self._store = open_store(self.settings.store)
        self.follower = Follower(
            store=self._store,
            model=self.settings.model,
            channel=self.settings.channel,
            cache_directory=cache_directory(),
            load=self._load,
            writes_status=serve.get_replica_context().rank.rank == 0,
        )
        self.follower.step()  # so that a replica that takes requests has a version where there is one
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.follower.run,
            args=(self._stop,),
            kwargs={"poll_s": self.settings.poll_s},
            name="follower",
            daemon=True,
        )
        self._thread.start()

    def _load(self, version: Version, directory: Path) -> Engine | Classifier:
        reference = version.base  # of a version that is an adapter alone
        base = None if reference is None else download_base(self._store, reference, cache_directory().parent)
        return load_engine(version, directory, self.settings.engine_settings(), base=base)

    def __del__(self) -> None:
        self._stop.set()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the thread that follows the channel has ended")

    def loaded(self) -> Loaded:
        """
        Raises:
            ApiError: 503, nothing is loaded yet, and why.
        """
        loaded = self.follower.current
        if loaded is None:
            message = _why_nothing(self.settings.model, self.follower.status)
            raise ApiError(503, message, kind="server_error", code="no_version")
        return loaded


def _replica() -> _Replica:
    """The one of this process."""
    servable: _Replica = serve.get_replica_context().servable_object
    return servable


async def _completions(request: Request) -> Response:
    body = await http.read_body(request)
    return await complete(body, _replica().loaded())


async def _chat_completions(request: Request) -> Response:
    body = await http.read_body(request)
    return await complete_chat(body, _replica().loaded())


async def _classify(request: Request) -> Response:
    body = await http.read_body(request)
    return await classify(body, _replica().loaded())


async def _models(request: Request) -> Response:
    loaded = _replica().follower.current
    return JSONResponse({"object": "list", "data": [] if loaded is None else [_model_document(loaded)]})


async def _model(request: Request) -> Response:
    wanted, loaded = request.path_params["model"], _replica().loaded()
    if wanted != loaded.version.model:
        message = f"The model `{wanted[:100]}` does not exist."
        raise ApiError(404, message, param="model", code="model_not_found")
    return JSONResponse(_model_document(loaded))


async def _healthz(request: Request) -> Response:
    settings, follower = _replica().settings, _replica().follower
    loaded = follower.current
    return JSONResponse(
        {
            "status": "ok",
            "model": settings.model,
            "channel": settings.channel,
            "num_sequences": 0 if loaded is None else loaded.engine.num_sequences,
            **follower.status.model_dump(mode="json", include={"serving", "tried", "rejected", "problem"}),
        }
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return http.error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    return http.error_response(ApiError(error.status_code, message, code="unknown_url"))


api = Starlette(
    routes=[
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat_completions, methods=["POST"]),
        Route("/v1/classify", _classify, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{model}", _model),
        Route("/healthz", _healthz),
    ],
    exception_handlers={ApiError: _api_error, HTTPException: _http_error},
)


def _why_nothing(model: str, status: ChannelStatus) -> str:
    if status.problem is not None:
        return f"No version of {model} is loaded: {status.problem}"
    if status.rejected:
        number, reason = max(status.rejected.items())
        return f"No version of {model} can serve: version {number} was rejected: {reason}"
    return f"No version released yet for {model}."


def _model_document(loaded: Loaded) -> dict[str, Any]:
    return openai_api.model_document(loaded.version.model, created_s=loaded.version.created_s)


def build(args: dict[str, Any]) -> serve.Application:
    """The application for one model.

    Raises:
        UsageError: an argument that is unknown, missing, or outside its limit, or another version of Headway asks.
    """
    try:
        settings = ServeSettings.model_validate(args)
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise UsageError(f"The serve application's argument {field}: {fault['msg']}.") from e
    if settings.headway not in (None, __version__):
        raise UsageError(
            f"This image holds Headway {__version__}, and the service was asked for by Headway {settings.headway}.",
            next_step=f"Name the image of {settings.headway} in the target's settings.",
        )
    deployment: Any = serve.deployment(serve.ingress(api)(_Replica))
    bound: serve.Application = deployment.options(
        name=DEPLOYMENT,
        num_replicas=settings.num_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    ).bind(settings.model_dump())
    return bound
