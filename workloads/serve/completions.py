"""Answers a request in OpenAI's format with whatever version is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from workloads.serve import openai_api
from workloads.serve.engine import Engine, FinishReason, Generation, NonFiniteLogits, Overloaded, Piece
from workloads.serve.follow import Loaded
from workloads.serve.openai_api import ApiError, CompletionRequest

logger = logging.getLogger("headway.serve")

VERSION_HEADER = "x-headway-version"
RETRY_AFTER_S = 1


def error_response(error: ApiError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.document(), status_code=error.status, headers=headers)


async def read_body(request: Request) -> bytes:
    """The body, read no further than it may be long.

    Raises:
        ApiError: 413.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > openai_api.MAX_BODY_BYTES:
            raise ApiError(413, f"The body of the request is above {openai_api.MAX_BODY_BYTES} bytes.")
    return bytes(body)


async def complete(body: bytes, loaded: Loaded) -> Response:
    """``POST /v1/completions``: a whole answer, or a stream of events.

    Raises:
        ApiError: what is wrong with the request, or with the server now.
    """
    request = openai_api.parse_completion(body)
    if request.model != loaded.version.model:
        raise ApiError(
            404,
            f"The model `{request.model[:100]}` does not exist here; this server has `{loaded.version.model}`.",
            param="model",
            code="model_not_found",
        )
    answer = _Answer(request, loaded)
    if not request.stream:
        return JSONResponse(await answer.whole(), headers=answer.headers)
    # The first event is awaited here, so that what fails before it still has a status code of its own, and so
    # that the generator has begun: one that has not would never run its clean-up if the client is gone already.
    events = answer.events()
    first = await anext(events)
    return StreamingResponse(
        _resumed(first, events),
        media_type="text/event-stream",
        headers={**answer.headers, "cache-control": "no-cache"},
    )


class _Answer:
    """One request's answer by one version, which stays in memory until the answer has ended."""

    def __init__(self, request: CompletionRequest, loaded: Loaded) -> None:
        self._request, self._loaded = request, loaded
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created_s = time.time()
        self._num_prompt_tokens = self._num_completion_tokens = 0
        self.headers = {VERSION_HEADER: loaded.version.name}

    async def whole(self) -> dict[str, Any]:
        texts: dict[int, list[str]] = {}
        reasons: dict[int, FinishReason | None] = {}
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                texts.setdefault(index, []).append(piece.text)
                reasons[index] = piece.finish_reason
        choices = [openai_api.choice(index, "".join(texts[index]), reasons[index]) for index in sorted(texts)]
        return {**self._document(choices), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        with_usage, has_begun = self._request.include_usage, False
        async with contextlib.aclosing(self._pieces()) as pieces:
            try:
                async for index, piece in pieces:
                    if piece.text or piece.finish_reason:
                        document = self._document([openai_api.choice(index, piece.text, piece.finish_reason)])
                        has_begun = True
                        yield openai_api.event({**document, "usage": None} if with_usage else document)
            except ApiError as e:
                if not has_begun:
                    raise
                yield openai_api.event(e.document())
                return
        if with_usage:
            yield openai_api.event({**self._document([]), "usage": self._usage()})
        yield openai_api.LAST_EVENT

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all sequences as they come, with the sequence's index.

        Raises:
            ApiError: too long a prompt, too many requests, a broken model.
        """
        engine, request = self._loaded.engine, self._request
        try:
            with engine.admit(len(request.prompt) * request.n):
                prompts = [
                    await engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompt
                ]
                wanted = openai_api.generations(
                    request, prompts, context_tokens=engine.context_tokens, vocab_size=engine.vocab_size
                )
                self._num_prompt_tokens = sum(len(prompt) for prompt in prompts)
                if request.echo:
                    for index, generation in enumerate(wanted):
                        yield index, Piece(text=await self._echo(index, generation), num_tokens=0)
                async with contextlib.aclosing(merged(engine, wanted)) as pieces:
                    async for index, piece in pieces:
                        self._num_completion_tokens += 1
                        yield index, piece
        except Overloaded as e:
            raise ApiError(429, str(e), kind="rate_limit_error", code="rate_limit_exceeded") from e
        except NonFiniteLogits as e:
            logger.error("%s: %s", self._loaded.version.name, e)
            raise ApiError(500, str(e), kind="server_error", code="non_finite_logits") from e
        except (ApiError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as e:
            logger.exception("%s failed to answer", self._loaded.version.name)
            raise ApiError(500, f"The model failed: {type(e).__name__}.", kind="server_error") from e

    async def _echo(self, index: int, generation: Generation) -> str:
        prompt = self._request.prompt[index // self._request.n]
        return prompt if isinstance(prompt, str) else await self._loaded.engine.decode(generation.prompt)

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        version = self._loaded.version
        return openai_api.completion(
            self._id, created_s=self._created_s, model=version.model, version_name=version.name, choices=choices
        )

    def _usage(self) -> dict[str, int]:
        return openai_api.usage(self._num_prompt_tokens, self._num_completion_tokens)


async def merged(engine: Engine, generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several sequences in the order in which they come. Closing it stops all of them."""
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
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _resumed(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        yield first
        async for item in events:
            yield item
