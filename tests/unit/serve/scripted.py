"""An engine that follows a script, and what it is asked through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse

from orchestrator.release.versions import VersionFile
from tests.tiny_model import make_version
from workloads.serve.admission import Overloaded
from workloads.serve.chat_template import NoChatTemplate, TemplateRefused
from workloads.serve.engine import Generation, Piece
from workloads.serve.loaded import Loaded

FILES = {"config.json": VersionFile(size_bytes=0, sha256="0" * 64)}


class ScriptedEngine:
    """Generates the words of a text, then raises where the script says so."""

    context_tokens, default_max_tokens, vocab_size, turn_end_tokens = 100, 4096, 256, (3,)

    def __init__(
        self, *words: str, error: Exception | None = None, full: bool = False, has_template: bool = True
    ) -> None:
        self._words, self._error, self._full = words, error, full
        self.has_template = has_template
        self.num_sequences = 0
        self.num_ended = 0
        self.stall = False
        self.asked: list[Generation] = []
        """What was to be generated."""

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        if self._full:
            raise Overloaded("full")
        self.num_sequences += num_sequences
        try:
            yield
        finally:
            self.num_sequences -= num_sequences

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As a template of one line a turn would. A conversation of more than five turns is refused."""
        if self.has_template is False:
            raise NoChatTemplate("This model has no chat template, so it cannot be chatted with.")
        if len(messages) > 5:
            raise TemplateRefused("This model's chat template does not take these messages: too many")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return list("".join([*lines, "assistant:"]).encode())

    async def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        self.asked.append(generation)
        try:
            for count, word in enumerate(self._words, start=1):
                last = count == len(self._words) and self._error is None
                yield Piece(text=word, num_tokens=count, finish_reason="stop" if last else None)
                await asyncio.sleep(0)
            if self.stall:
                await asyncio.Event().wait()
            if self._error is not None:
                raise self._error
        finally:
            self.num_ended += 1


def ask(
    endpoint: Callable[[bytes, Loaded], Awaitable[Response]], engine: Any, fields: dict[str, Any]
) -> tuple[Response, bytes]:
    """The answer to a request, and its whole body."""

    async def run() -> tuple[Response, bytes]:
        loaded = Loaded(version=make_version(number=3, files=FILES), engine=engine)
        response = await endpoint(json.dumps({"model": "code-lm", **fields}).encode(), loaded)
        if isinstance(response, StreamingResponse):
            return response, b"".join([bytes(part) async for part in response.body_iterator])
        return response, bytes(response.body)

    found = asyncio.run(run())
    assert engine.num_sequences == 0
    return found


def events(body: bytes) -> list[Any]:
    lines = body.decode().split("\n\n")
    assert lines.pop() == ""
    return [line.removeprefix("data: ") if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
