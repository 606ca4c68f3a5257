from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from starlette.responses import JSONResponse, StreamingResponse

from workloads.serve.forward import parts, try_forward

HEAD = {"status": 200, "headers": {"x-headway-version": "lm@1"}}


class Items:
    """What Ray gives for a method that yields."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self.is_cancelled = False

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> Any:
        if not self._script:
            raise StopAsyncIteration
        item = self._script.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment one of whose replicas is asked."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self.asked: list[tuple[Any, ...]] = []

    def options(self, **options: Any) -> Handle:
        assert options == {"method_name": "forwarded", "stream": True}
        return self

    def remote(self, *arguments: Any) -> Items:
        self.asked.append(arguments)
        return self._items


async def ask(items: Items, accept_s: float = 60.0) -> StreamingResponse | None:
    handle = Handle(items)
    response = await try_forward(handle, "chat", b"{}", {"a": "b"}, left_s=5.0, accept_s=accept_s)
    assert handle.asked == [("chat", b"{}", {"a": "b"}, 5.0)]
    return response


def test_another_replica_answers() -> None:
    async def run() -> tuple[int, str, bytes]:
        response = await ask(Items(True, HEAD, b"one", b"two"))
        assert response is not None
        body = b"".join([bytes(part) async for part in response.body_iterator])
        return response.status_code, response.headers["x-headway-version"], body

    assert asyncio.run(run()) == (200, "lm@1", b"onetwo")


@pytest.mark.parametrize("script", [(False,), (RayActorError(),), (True, RayActorError())])
def test_one_that_does_not_answer_is_left(script: tuple[Any, ...]) -> None:
    items = Items(*script)
    assert asyncio.run(ask(items)) is None
    assert items.is_cancelled


def test_one_that_does_not_listen_is_left() -> None:
    class Silent(Items):
        async def __anext__(self) -> Any:
            await asyncio.Event().wait()

    items = Silent()
    assert asyncio.run(ask(items, accept_s=0.01)) is None
    assert items.is_cancelled


@pytest.mark.parametrize("script", [(asyncio.CancelledError(),), (True, HEAD, b"one", asyncio.CancelledError())])
def test_a_client_that_goes_away_stops_the_other_replica(script: tuple[Any, ...]) -> None:
    items = Items(*script)

    async def run() -> None:
        response = await ask(items)
        assert response is not None
        async for _ in response.body_iterator:
            pass

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert items.is_cancelled


def test_an_answer_comes_in_parts() -> None:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield b"one"
        yield b"two"

    async def run(response: Any) -> list[Any]:
        return [part async for part in parts(response)]

    head, *body = asyncio.run(run(StreamingResponse(stream(), headers={"x-headway-version": "lm@1"})))
    assert (head["status"], head["headers"]["x-headway-version"], body) == (200, "lm@1", [b"one", b"two"])
    head, *body = asyncio.run(run(JSONResponse({"a": 1}, status_code=400)))
    assert (head["status"], body) == (400, [b'{"a":1}'])
