"""The Ray Serve application: ``workloads.serve.app:build``. Replicas that follow the channel, and one decider.

Works with Serve's own command line and REST API::

    serve run workloads.serve.app:build model=code-lm channel=production store=s3://bucket/prefix
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator import __version__
from orchestrator.errors import UsageError
from orchestrator.release.versions import Version
from workloads.serve import http, metrics, openai_api
from workloads.serve.decider_actor import DeciderActor
from workloads.serve.openai_api import ApiError
from workloads.serve.replica import DEPLOYMENT, Replica
from workloads.serve.settings import ServeSettings

_MAX_ONGOING = 1000  # above what the engine admits, so that it is the engine that answers 429
_DRAIN_S = 30.0
"""For requests that are being answered by a replica that is taken away; half of what a pod's end leaves."""


def _replica() -> Replica:
    """The one of this process."""
    servable: Replica = serve.get_replica_context().servable_object
    return servable


async def _completions(request: Request) -> Response:
    return await _replica().respond("completions", request)


async def _chat_completions(request: Request) -> Response:
    return await _replica().respond("chat", request)


async def _classify(request: Request) -> Response:
    return await _replica().respond("classify", request)


async def _models(request: Request) -> Response:
    _require_key(request)
    version = _replica().follower.version
    return JSONResponse({"object": "list", "data": [] if version is None else [_model_document(version)]})


async def _model(request: Request) -> Response:
    _require_key(request)
    return await _ready(request)


async def _ready(request: Request) -> Response:
    """For those who wait until the model answers, and have no key."""
    wanted, version = request.path_params["model"], _replica().version()
    if wanted != version.model:
        message = f"The model `{wanted[:100]}` does not exist."
        raise ApiError(404, message, param="model", code="model_not_found")
    return JSONResponse(_model_document(version))


async def _healthz(request: Request) -> Response:
    return JSONResponse(_replica().health())


async def _metrics(request: Request) -> Response:
    replica = _replica()
    follower = replica.follower
    text = metrics.exposition(
        replica.settings.model,
        follower.serving,
        follower.loads.counters,
        num_forwarded=replica.num_forwarded,
        rejected=follower.rejected,
        has_problem=follower.problem is not None,
    )
    return Response(text, media_type=metrics.CONTENT_TYPE)


def _require_key(request: Request) -> None:
    _replica().keys.require(request.headers.get("authorization", ""))


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
        Route("/readyz/{model}", _ready),
        Route("/metrics", _metrics),
    ],
    exception_handlers={ApiError: _api_error, HTTPException: _http_error},
)


def _model_document(version: Version) -> dict[str, Any]:
    return openai_api.model_document(version.model, created_s=version.created_s)


def build(args: dict[str, Any]) -> serve.Application:
    """The application for one model.

    Raises:
        UsageError: an argument that is unknown, missing, or outside its limit, or another version of Headway asks.
    """
    try:
        settings = ServeSettings.model_validate(args)
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "max_replicas"
        raise UsageError(f"The serve application's argument {field}: {fault['msg']}.") from e
    if settings.headway not in (None, __version__):
        raise UsageError(
            f"This image holds Headway {__version__}, and the service was asked for by Headway {settings.headway}.",
            next_step=f"Name the image of {settings.headway} in the target's settings.",
        )
    document = settings.model_dump(mode="json")
    decider_deployment: Any = serve.deployment(DeciderActor)
    decider = decider_deployment.options(
        name="decider",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # a line for each report of each replica
    ).bind(document)
    deployment: Any = serve.deployment(serve.ingress(api)(Replica))
    bound: serve.Application = deployment.options(
        name=DEPLOYMENT,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        **settings.replicas(),
    ).bind(document, decider)
    return bound
