"""Requests and answers as HTTP has them, and the errors of engines as the API has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from workloads.serve import openai_api
from workloads.serve.admission import Overloaded
from workloads.serve.chat_template import NoChatTemplate, TemplateRefused
from workloads.serve.loaded import Loaded
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.openai_api import ApiError

logger = logging.getLogger("headway.serve")

VERSION_HEADER = "x-headway-version"
RETRY_AFTER_S = 1
BODY_TIMEOUT_S = 30.0
"""For the whole body of a request. Until it is there, the request holds one of the replica's places."""


def error_response(error: ApiError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.document(), status_code=error.status, headers=headers)


def timed_out() -> ApiError:
    return ApiError(504, "The request took longer than this server allows.", kind="server_error", code="timeout")


async def read_body(request: Request, *, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The body, read no further than it may be long, and waited for no longer than ``timeout_s``.

    Raises:
        ApiError: 408, 413.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > openai_api.MAX_BODY_BYTES:
                    raise ApiError(413, f"The body of the request is above {openai_api.MAX_BODY_BYTES} bytes.")
    except TimeoutError as e:
        raise ApiError(408, f"The body of the request took longer than {timeout_s:g} s.", code="timeout") from e
    return bytes(body)


def require_model(wanted: str, loaded: Loaded) -> None:
    """
    Raises:
        ApiError: 404, another model is asked for than the one that is served.
    """
    if wanted != loaded.version.model:
        raise ApiError(
            404,
            f"The model `{wanted[:100]}` does not exist here; this server has `{loaded.version.model}`.",
            param="model",
            code="model_not_found",
        )


@contextmanager
def api_errors(version_name: str) -> Iterator[None]:
    """What goes wrong within, as an :class:`ApiError`. Nothing of what a foreign library says goes out."""
    try:
        yield
    except Overloaded as e:
        raise ApiError(429, str(e), kind="rate_limit_error", code="rate_limit_exceeded") from e
    except NoChatTemplate as e:
        raise ApiError(400, f"{e} Use /v1/completions.", code="no_chat_template") from e
    except TemplateRefused as e:
        raise ApiError(400, str(e), param="messages") from e
    except NonFiniteLogits as e:
        logger.error("%s: %s", version_name, e)
        raise ApiError(500, str(e), kind="server_error", code="non_finite_logits") from e
    except (ApiError, asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as e:
        logger.exception("%s failed to answer", version_name)
        raise ApiError(500, f"The model failed: {type(e).__name__}.", kind="server_error") from e
