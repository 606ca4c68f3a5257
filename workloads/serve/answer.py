"""Answers a request for generated text with whatever version is loaded: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from workloads.serve import openai_api
from workloads.serve.engine import Engine, FinishReason, Generation, Piece
from workloads.serve.http import VERSION_HEADER, api_errors, require_model, timed_out
from workloads.serve.loaded import Loaded
from workloads.serve.openai_api import ApiError, SamplingRequest

_T = TypeVar("_T")


class Answer(ABC):
    """One request's answer by one version, which stays in memory until the answer has ended."""

    id_prefix: ClassVar[str]

    def __init__(self, request: SamplingRequest, loaded: Loaded, *, deadline_s: float | None = None) -> None:
        """
        Args:
            deadline_s: when it has to have ended, by the event loop's clock.

        Raises:
            ApiError: 404, another model; 400, one that generates nothing.
        """
        require_model(request.model, loaded)
        self.request, self.loaded, self.deadline_s = request, loaded, deadline_s
        self.engine: Engine = loaded.generator()
        self.version = loaded.version
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created_s = time.time()
        self._num_prompt_tokens = self._num_completion_tokens = 0

    @property
    @abstractmethod
    def num_sequences(self) -> int: ...

    @abstractmethod
    async def generations(self) -> tuple[list[Generation], int]:
        """What to generate, and the tokens of all prompts together.

        Raises:
            ApiError: it does not fit the model.
        """

    async def given(self, wanted: Sequence[Generation]) -> dict[int, str]:
        """Text that is sent before anything is generated, by sequence."""
        return {}

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        """One sequence of a whole answer."""

    @abstractmethod
    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        """What is new of one sequence, in a stream."""

    @abstractmethod
    def document(self, choices: list[dict[str, Any]], *, is_event: bool) -> dict[str, Any]: ...

    async def respond(self) -> Response:
        headers = {VERSION_HEADER: self.version.name}
        if not self.request.stream:
            return JSONResponse(await self._whole(), headers=headers)
        # The first event is awaited here, so that what fails before it still has a status code of its own, and so
        # that the generator has begun: one that has not would never run its clean-up if the client is gone already.
        events = self._events()
        first = await anext(events)
        return StreamingResponse(
            _resumed(first, events),
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache"},
        )

    async def _whole(self) -> dict[str, Any]:
        texts: dict[int, list[str]] = {}
        reasons: dict[int, FinishReason | None] = {}
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                texts.setdefault(index, []).append(piece.text)
                reasons[index] = piece.finish_reason
        choices = [self.choice(index, "".join(texts[index]), reasons[index]) for index in sorted(texts)]
        return {**self.document(choices, is_event=False), "usage": self._usage()}

    async def _events(self) -> AsyncGenerator[bytes, None]:
        with_usage, has_begun = self.request.include_usage, False
        async with contextlib.aclosing(self._pieces()) as pieces:
            try:
                async for index, piece in pieces:
                    if piece.text or piece.finish_reason:
                        document = self.document([self.delta(index, piece.text, piece.finish_reason)], is_event=True)
                        has_begun = True
                        yield openai_api.event({**document, "usage": None} if with_usage else document)
            except ApiError as e:
                if not has_begun:
                    raise
                yield openai_api.event(e.document())
                return
        if with_usage:
            yield openai_api.event({**self.document([], is_event=True), "usage": self._usage()})
        yield openai_api.LAST_EVENT

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all sequences as they come, with the sequence's index.

        Raises:
            ApiError: too long a prompt, too many requests, a broken model, too little time.
        """
        counted = self.loaded.counter.request()
        with counted as counter, api_errors(self.version.name), self.engine.admit(self.num_sequences):
            wanted, self._num_prompt_tokens = await self.generations()
            for index, text in (await self.given(wanted)).items():
                yield index, Piece(text=text, num_tokens=0)
            before: dict[int, int] = {}  # tokens of each sequence: a piece may bring several
            async with contextlib.aclosing(merged(self.engine, wanted, self.deadline_s)) as pieces:
                async for index, piece in pieces:
                    num_new = piece.num_tokens - before.get(index, 0)
                    before[index] = piece.num_tokens
                    self._num_completion_tokens += num_new
                    counter.add_tokens(num_new)
                    yield index, piece

    def _usage(self) -> dict[str, int]:
        return openai_api.usage(self._num_prompt_tokens, self._num_completion_tokens)


async def merged(
    engine: Engine, generations: Sequence[Generation], deadline_s: float | None = None
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several sequences in the order in which they come. Closing it stops all of them.

    Raises:
        ApiError: 504, they had not all ended by ``deadline_s`` of the event loop's clock.
    """
    arrived: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def follow(index: int, generation: Generation) -> None:
        try:
            async with contextlib.aclosing(engine.generate(generation)) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((index, piece))
        except Exception as e:
            arrived.put_nowait(e)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(follow(*item)) for item in enumerate(generations)]
    try:
        num_left = len(tasks)
        while num_left:
            item = await _before(deadline_s, arrived.get())
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _before(deadline_s: float | None, arriving: Coroutine[Any, Any, _T]) -> _T:
    try:
        async with asyncio.timeout_at(deadline_s):
            return await arriving
    except TimeoutError as e:
        raise timed_out() from e


async def _resumed(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        yield first
        async for item in events:
            yield item
