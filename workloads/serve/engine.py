"""What turns a prompt into tokens, as the API sees it: the :class:`Engine` protocol and what goes in and out of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sequence to generate."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token every time."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()
    """Tokens that end it beside the model's own."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one more token brought. ``text`` may be empty while a character or stop sequence is incomplete."""

    text: str
    num_tokens: int
    """Generated so far, this piece included."""
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """One loaded version that generates, as the API sees it."""

    context_tokens: int
    """The most tokens that a prompt and its completion may have together."""
    default_max_tokens: int
    """The most tokens of a chat's answer whose request sets no limit."""
    vocab_size: int
    turn_end_tokens: tuple[int, ...]
    """Tokens that end the assistant's turn of a chat, beside those that the model's config names."""

    @property
    def num_sequences(self) -> int:
        """Admitted now: under way or waiting."""
        ...

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        """Reserve room for a request's sequences while the context lasts.

        Raises:
            Overloaded: too many are waiting already.
        """
        ...

    async def encode(self, text: str) -> list[int]:
        """The prompt's tokens; for an empty text, the token that a document begins with."""
        ...

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt's tokens for the assistant's next turn, by the model's own chat template.

        Raises:
            NoChatTemplate: the model has none. TemplateRefused: it does not take these messages.
        """
        ...

    async def decode(self, tokens: Sequence[int]) -> str: ...

    def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Pieces as they come; the last one carries the finish reason. Closing the generator stops the model.

        Raises:
            NonFiniteLogits: the model is broken.
        """
        ...
