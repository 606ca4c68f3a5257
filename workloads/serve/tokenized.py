"""What engines have in common that generate from a version's tokens, whoever runs its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from workloads.serve.admission import Admission, EngineSettings
from workloads.serve.tokens import Tokens


class TokenizedEngine:
    """All of :class:`workloads.serve.engine.Engine` but ``generate``."""

    def __init__(self, tokens: Tokens, settings: EngineSettings) -> None:
        self._tokens = tokens
        self._admission = Admission(settings)
        self.vocab_size, self.context_tokens = tokens.vocab_size, tokens.context_tokens
        self.turn_end_tokens, self.default_max_tokens = tokens.turn_end_tokens, settings.default_max_tokens

    @property
    def num_sequences(self) -> int:
        return self._admission.num_sequences

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        return self._admission.admit(num_sequences)

    async def encode(self, text: str) -> list[int]:
        return await self._tokens.encode(text)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await self._tokens.encode_chat(messages)

    async def decode(self, tokens: Sequence[int]) -> str:
        return await self._tokens.decode(tokens)
