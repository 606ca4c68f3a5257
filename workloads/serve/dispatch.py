"""Has a request answered by the stable version or by the canary. A canary's failure is not the client's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from workloads.serve.loaded import Loaded, Serving
from workloads.serve.openai_api import ApiError
from workloads.serve.route import takes_canary

Endpoint = Callable[[bytes, Loaded, float | None], Awaitable[Response]]
"""Answers a body with a version, until a deadline by the event loop's clock. Raises :class:`ApiError`."""


def choose(serving: Serving, *, key: str) -> list[Loaded]:
    """The version that is to answer, and behind a canary the stable one, which answers where the canary fails.

    Args:
        key: what the request is told apart by (:func:`workloads.serve.route.share_key`).
    """
    stable, canary = serving.stable, serving.canary
    assert stable is not None
    if canary is None or not takes_canary(key, version=canary.version.number, weight=serving.weight):
        return [stable]
    return [canary, stable]


async def dispatch(endpoint: Endpoint, body: bytes, chosen: list[Loaded], *, deadline_s: float) -> Response:
    """
    Args:
        chosen: by :func:`choose`. They are taken out of it as they are asked, so that nothing but the answer itself
            keeps a version in memory.

    Raises:
        ApiError: as the stable version says it; a canary's 504 too, since there is no time left for another.
    """
    if len(chosen) == 1:
        return await endpoint(body, chosen.pop(), deadline_s)
    counter = chosen[0].counter
    try:
        return await endpoint(body, chosen.pop(0), deadline_s)
    except ApiError as e:
        if e.status == 504:
            raise
        refused = e.status < 500 and e.status != 429
    response = await endpoint(body, chosen.pop(), deadline_s)
    if refused:
        counter.add_failure()  # of what the stable version takes
    return response
