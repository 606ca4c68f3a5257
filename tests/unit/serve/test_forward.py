from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.responses import JSONResponse, StreamingResponse

from workloads.serve.forward import forward, parts
from workloads.serve.openai_api import ApiError

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
    """A deployment one of whose replicas is asked, then another, until none is left."""

    def __init__(self, *answers: Items | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    @property
    def is_left(self) -> bool:
        return bool(self._answers)

    def options(self, **options: Any) -> Handle:
        assert options == {"method_name": "forwarded", "stream": True}
        return self

    def remote(self, *arguments: Any) -> Items:
        self.asked.append(arguments)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def ask(*answers: Items | Exception, accept_s: float = 60.0, left_s: float = 60.0) -> StreamingResponse | None:
    """As long as there is a replica to ask."""
    handle = Handle(*answers)
    deadline_s = asyncio.get_running_loop().time() + left_s
    response = await forward(
        handle,
        "chat",
        b"{}",
        {"a": "b"},
        deadline_s=deadline_s,
        is_needed=lambda: handle.is_left,
        accept_s=accept_s,
    )
    for *arguments, left in handle.asked:
        assert arguments == ["chat", b"{}", {"a": "b"}]
        assert 0 < left <= left_s
    return response


def test_another_replica_answers() -> None:
    declined = Items(False)

    async def run() -> tuple[int, str, bytes]:
        response = await ask(declined, Items(True, HEAD, b"one", b"two"))
        assert response is not None
        assert declined.is_cancelled
        body = b"".join([bytes(part) async for part in response.body_iterator])
        return response.status_code, response.headers["x-headway-version"], body

    assert asyncio.run(run()) == (200, "lm@1", b"onetwo")


@pytest.mark.parametrize("script", [(False,), (RayActorError(),), (RayServeException(),)])
def test_one_that_does_not_answer_is_left(script: tuple[Any, ...]) -> None:
    items = Items(*script)
    assert asyncio.run(ask(items)) is None
    assert items.is_cancelled
    assert asyncio.run(ask(RayServeException())) is None


def test_what_was_declined_stays_open_until_the_request_has_its_place() -> None:
    declined = Items(False)

    class Taken(Items):
        async def __anext__(self) -> Any:
            assert declined.is_cancelled is False
            return await super().__anext__()

    assert asyncio.run(ask(declined, Items(RayActorError()), Taken(True, HEAD))) is not None
    assert declined.is_cancelled


@pytest.mark.parametrize("error", [RayActorError(), RayServeException()])
def test_one_that_dies_once_it_has_begun_is_not_asked_again(error: Exception) -> None:
    items = Items(True, error)
    with pytest.raises(ApiError) as caught:
        asyncio.run(ask(items, Items(True, HEAD)))
    assert caught.value.status == 500
    assert items.is_cancelled


def test_there_is_no_end_to_waiting_but_the_deadline() -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(ask(Items(True, HEAD), left_s=0.0))
    assert (caught.value.status, caught.value.code) == (504, "timeout")


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
