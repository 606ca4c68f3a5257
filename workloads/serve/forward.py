"""Hands a request to another replica, as long as this one has no version loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray.exceptions import RayError
from starlette.responses import Response, StreamingResponse

ACCEPT_S = 0.5
"""How long a replica may take to say whether it answers."""
_METHOD = "forwarded"


async def try_forward(
    handle: Any, kind: str, body: bytes, headers: dict[str, str], *, left_s: float, accept_s: float = ACCEPT_S
) -> StreamingResponse | None:
    """The answer of whichever replica Serve's router names. None where that one has no version either: the router does
    not know, and may even name the one that asks.

    Args:
        handle: this application's own deployment. Its method ``forwarded`` gives whether it answers, then
            :func:`parts` of the answer.
        left_s: how long the answer may take.
    """
    items = handle.options(method_name=_METHOD, stream=True).remote(kind, body, headers, left_s)
    is_handed_on = False
    try:
        if not await asyncio.wait_for(anext(items), accept_s):
            return None
        head = await anext(items)
        is_handed_on = True
        return StreamingResponse(_rest(items), status_code=head["status"], headers=head["headers"])
    except (RayError, TimeoutError):  # it died before its first byte, or does not listen
        return None
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
