"""``POST /v1/chat/completions``: a conversation, and the assistant's next turn."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from workloads.serve import chat_api, openai_api
from workloads.serve.answer import Answer
from workloads.serve.chat_api import ChatRequest
from workloads.serve.engine import FinishReason, Generation
from workloads.serve.loaded import Loaded


async def complete_chat(body: bytes, loaded: Loaded, deadline_s: float | None = None) -> Response:
    """A whole answer, or a stream of events.

    Raises:
        ApiError: what is wrong with the request, or with the server now; 400 where the model has no chat template.
    """
    return await _Chat(chat_api.parse_chat(body), loaded, deadline_s=deadline_s).respond()


class _Chat(Answer):
    id_prefix = "chatcmpl"
    request: ChatRequest

    def __init__(self, request: ChatRequest, loaded: Loaded, *, deadline_s: float | None = None) -> None:
        super().__init__(request, loaded, deadline_s=deadline_s)
        self._begun: set[int] = set()  # sequences of which an event was made

    @property
    def num_sequences(self) -> int:
        return self.request.n

    async def generations(self) -> tuple[list[Generation], int]:
        engine, request = self.engine, self.request
        prompt = await engine.encode_chat([message.for_template() for message in request.messages])
        room = openai_api.room_for(
            request.token_limit, len(prompt), context_tokens=engine.context_tokens, param="messages"
        )
        max_tokens = request.token_limit or min(engine.default_max_tokens, room)
        wanted = [
            openai_api.generation(
                request, prompt, max_tokens=max_tokens, number=number, end_tokens=engine.turn_end_tokens
            )
            for number in range(request.n)
        ]
        return wanted, len(prompt)

    def choice(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        return chat_api.message_choice(index, text, finish_reason)

    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        is_first = index not in self._begun
        self._begun.add(index)
        return chat_api.delta_choice(index, text, finish_reason, is_first=is_first)

    def document(self, choices: list[dict[str, Any]], *, is_event: bool) -> dict[str, Any]:
        return chat_api.chat_completion(
            self.id,
            created_s=self.created_s,
            model=self.version.model,
            version_name=self.version.name,
            choices=choices,
            is_chunk=is_event,
        )
