"""The format of ``/v1/chat/completions``. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from workloads.serve.engine import FinishReason
from workloads.serve.openai_api import ApiError, Neutral, SamplingRequest, parse, unbroken

MAX_MESSAGES = 1000
_NEUTRAL: Neutral = {
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_NEUTRAL_IN_MESSAGE: Neutral = {"annotations": ([],), "refusal": (), "tool_calls": ([],)}
"""What the official client sends back with an assistant's message that it was given."""


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is the newer word for system."""
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        """A text, or a list of parts of which all are text."""
        if not isinstance(value, list):
            return unbroken(value) if isinstance(value, str) else value
        texts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('may hold only parts of the form {"type": "text", "text": …}')
            texts.append(unbroken(part["text"]))
        return "".join(texts)

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, **({"name": self.name} if self.name is not None else {})}


class ChatRequest(SamplingRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """The older word for ``max_completion_tokens``."""

    @field_validator("messages", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        """Messages without what is null or asks for nothing."""
        if not isinstance(value, list):
            return value
        return tuple(_without_neutral(message) if isinstance(message, dict) else message for message in value)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse_chat(body: bytes) -> ChatRequest:
    """
    Raises:
        ApiError: 400, naming the argument, its value's fault and the limit.
    """
    request = parse(body, ChatRequest, neutral=_NEUTRAL)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        message = "max_tokens and max_completion_tokens are two words for one limit; set one of them."
        raise ApiError(400, message, param="max_tokens")
    return request


def message_choice(index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


def delta_choice(
    index: int, text: str, finish_reason: FinishReason | None, *, is_first: bool = False
) -> dict[str, Any]:
    """What is new in one event of a stream; the first of a sequence says who speaks."""
    delta = {**({"role": "assistant"} if is_first else {}), **({"content": text} if text or is_first else {})}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def chat_completion(
    id_: str,
    *,
    created_s: float,
    model: str,
    version_name: str,
    choices: list[dict[str, Any]],
    is_chunk: bool,
) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "chat.completion.chunk" if is_chunk else "chat.completion",
        "created": int(created_s),
        "model": model,
        "system_fingerprint": version_name,
        "choices": choices,
    }


def _without_neutral(message: dict[str, Any]) -> dict[str, Any]:
    asked = {name: value for name, value in message.items() if value is not None}
    return {name: value for name, value in asked.items() if value not in _NEUTRAL_IN_MESSAGE.get(name, ())}
