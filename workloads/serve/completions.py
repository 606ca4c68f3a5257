"""``POST /v1/completions``: a prompt, and what comes after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from workloads.serve import completion_api
from workloads.serve.answer import Answer
from workloads.serve.completion_api import CompletionRequest
from workloads.serve.engine import FinishReason, Generation
from workloads.serve.loaded import Loaded


async def complete(body: bytes, loaded: Loaded, deadline_s: float | None = None) -> Response:
    """A whole answer, or a stream of events.

    Raises:
        ApiError: what is wrong with the request, or with the server now.
    """
    return await _Completion(completion_api.parse_completion(body), loaded, deadline_s=deadline_s).respond()


class _Completion(Answer):
    id_prefix = "cmpl"
    request: CompletionRequest

    @property
    def num_sequences(self) -> int:
        return len(self.request.prompt) * self.request.n

    async def generations(self) -> tuple[list[Generation], int]:
        engine = self.engine
        prompts = [await engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.request.prompt]
        wanted = completion_api.generations(
            self.request, prompts, context_tokens=engine.context_tokens, vocab_size=engine.vocab_size
        )
        return wanted, sum(len(prompt) for prompt in prompts)

    async def given(self, wanted: Sequence[Generation]) -> dict[int, str]:
        """With ``echo``, the prompts."""
        if not self.request.echo:
            return {}
        return {index: await self._echo(index, generation) for index, generation in enumerate(wanted)}

    async def _echo(self, index: int, generation: Generation) -> str:
        prompt = self.request.prompt[index // self.request.n]
        return prompt if isinstance(prompt, str) else await self.engine.decode(generation.prompt)

    def choice(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        return completion_api.choice(index, text, finish_reason)

    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        return completion_api.choice(index, text, finish_reason)

    def document(self, choices: list[dict[str, Any]], *, is_event: bool) -> dict[str, Any]:
        return completion_api.completion(
            self.id,
            created_s=self.created_s,
            model=self.version.model,
            version_name=self.version.name,
            choices=choices,
        )
