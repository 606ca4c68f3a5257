"""The format of ``/v1/completions``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from workloads.serve.engine import FinishReason, Generation
from workloads.serve.openai_api import (
    MAX_SEQUENCES,
    ApiError,
    Neutral,
    SamplingRequest,
    generation,
    parse,
    room_for,
    unbroken,
)

DEFAULT_MAX_TOKENS = 16
_NEUTRAL: Neutral = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
    "suffix": ("",),
}

Prompt = str | tuple[int, ...]


class CompletionRequest(SamplingRequest):
    """The body of ``POST /v1/completions``."""

    prompt: tuple[Prompt, ...]
    """One or more; token ids are not checked against the vocabulary yet."""
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: object) -> tuple[Prompt, ...]:
        prompts: list[Any]
        if isinstance(value, str) or (isinstance(value, list) and value and _is_tokens(value)):
            prompts = [value]
        elif isinstance(value, list) and value:
            prompts = value
        else:
            prompts = [None]
        if not all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in prompts):
            raise ValueError("must be a string, a list of strings, a list of token ids, or a list of those")
        if len(prompts) > MAX_SEQUENCES:
            raise ValueError(f"has {len(prompts)} prompts; the limit is {MAX_SEQUENCES}")
        return tuple(unbroken(prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)


def parse_completion(body: bytes) -> CompletionRequest:
    """
    Raises:
        ApiError: 400, naming the argument, its value's fault and the limit.
    """
    request = parse(body, CompletionRequest, neutral=_NEUTRAL)
    if len(request.prompt) * request.n > MAX_SEQUENCES:
        asked = f"{len(request.prompt)} prompts with n = {request.n}"
        raise ApiError(400, f"{asked} are more than {MAX_SEQUENCES} completions at once.", param="n")
    return request


def generations(
    request: CompletionRequest, prompts: Sequence[Sequence[int]], *, context_tokens: int, vocab_size: int
) -> list[Generation]:
    """What to generate: for each prompt ``n`` sequences, each with its own seed.

    Raises:
        ApiError: 400, a prompt that is empty, of foreign tokens, or too long for the model's context.
    """
    found: list[Generation] = []
    for prompt in prompts:
        _require_prompt(prompt, vocab_size=vocab_size)
        room = room_for(request.max_tokens, len(prompt), context_tokens=context_tokens, param="prompt")
        max_tokens = request.max_tokens or min(DEFAULT_MAX_TOKENS, room)
        for _ in range(request.n):
            found.append(generation(request, prompt, max_tokens=max_tokens, number=len(found)))
    return found


def choice(index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


def completion(
    id_: str, *, created_s: float, model: str, version_name: str, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    """A completion, or one event of a streamed one; they have the same form."""
    return {
        "id": id_,
        "object": "text_completion",
        "created": int(created_s),
        "model": model,
        "system_fingerprint": version_name,
        "choices": choices,
    }


def _require_prompt(prompt: Sequence[int], *, vocab_size: int) -> None:
    if not prompt:
        raise ApiError(400, "The prompt is empty, and this model has no token that begins a text.", param="prompt")
    foreign = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if foreign is not None:
        raise ApiError(400, f"Token id {foreign} is outside the vocabulary, 0 … {vocab_size - 1}.", param="prompt")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
