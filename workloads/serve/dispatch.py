"""Has a request answered by the stable version or by the canary. A canary's failure is not the client's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from workloads.serve.loaded import Loaded, Serving
from workloads.serve.openai_api import ApiError
from workloads.serve.route import takes_canary

Endpoint = Callable[[bytes, Loaded, float | None], Awaitable[Response]]
"""Answers a body with a version, until a deadline by the event loop's clock. Raises :class:`ApiError`."""


async def dispatch(endpoint: Endpoint, body: bytes, serving: Serving, *, key: str, deadline_s: float) -> Response:
    """
    Args:
        key: what the request is told apart by (:func:`workloads.serve.route.share_key`).

    Raises:
        ApiError: as the stable version says it.
    """
    stable, canary = serving.stable, serving.canary
    assert stable is not None
    if canary is None or not takes_canary(key, version=canary.version.number, weight=serving.weight):
        return await endpoint(body, stable, deadline_s)
    try:
        return await endpoint(body, canary, deadline_s)
    except ApiError as e:
        if e.status == 504:
            raise  # there is no time left for another
        refused = e.status < 500 and e.status != 429
    response = await endpoint(body, stable, deadline_s)
    if refused:
        canary.counter.add_failure()  # of what the stable version takes
    return response
