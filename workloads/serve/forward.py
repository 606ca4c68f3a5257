"""Hands a request to another replica, as long as this one has no version loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.responses import Response, StreamingResponse

from workloads.serve.http import timed_out
from workloads.serve.openai_api import ApiError

ACCEPT_S = 0.5
"""How long a replica may take to say whether it answers."""
_AGAIN_S = 0.02  # between two replicas that are asked
_METHOD = "forwarded"


async def forward(
    handle: Any,
    kind: str,
    body: bytes,
    headers: dict[str, str],
    *,
    deadline_s: float,
    is_needed: Callable[[], bool],
    accept_s: float = ACCEPT_S,
) -> StreamingResponse | None:
    """The answer of whichever replica takes the request; None once it ``is_needed`` no more.

    Calls that were declined stay open meanwhile: they make the queue of whoever declines look long to Serve's router,
    which does not know of versions, and would name the same one again, even the one that asks.

    Args:
        handle: this application's own deployment. Its method ``forwarded`` gives whether it answers, then
            :func:`parts` of the answer.
        deadline_s: when the answer has to have ended, by the event loop's clock.

    Raises:
        ApiError: 504, none took it in time. 500, the one that took it died: another must not begin again.
    """
    loop = asyncio.get_running_loop()
    forwarded = handle.options(method_name=_METHOD, stream=True)
    calls: list[Any] = []
    try:
        while is_needed():
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                raise timed_out()
            items = None
            try:
                items = forwarded.remote(kind, body, headers, left_s)
                calls.append(items)
                if await asyncio.wait_for(anext(items), accept_s):
                    return await _accepted(calls.pop())
            except (RayError, RayServeException, TimeoutError):  # it has died, or does not listen
                if items is not None:
                    items.cancel()  # at once, so that it does not take the request later
            await asyncio.sleep(_AGAIN_S)
        return None
    finally:
        for declined in calls:
            declined.cancel()


async def _accepted(items: Any) -> StreamingResponse:
    is_handed_on = False
    try:
        head = await anext(items)
        is_handed_on = True
        return StreamingResponse(_rest(items), status_code=head["status"], headers=head["headers"])
    except (RayError, RayServeException) as e:
        raise ApiError(500, "The replica that answered has failed.", kind="server_error") from e
    finally:
        if not is_handed_on:
            items.cancel()


async def parts(response: Response) -> AsyncGenerator[Any, None]:
    """A response as items that Ray sends: its status and headers, then its body."""
    yield {"status": response.status_code, "headers": dict(response.headers)}
    if not isinstance(response, StreamingResponse):
        yield bytes(response.body)
        return
    iterator: Any = response.body_iterator
    async with contextlib.aclosing(iterator):
        async for item in iterator:
            yield item


async def _rest(items: Any) -> AsyncIterator[bytes]:
    is_whole = False
    try:
        async for item in items:
            yield item
        is_whole = True
    finally:
        if not is_whole:  # the client has gone away
            items.cancel()
