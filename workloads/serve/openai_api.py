"""OpenAI's completions format: requests checked, answers and errors built. Pure.

Source: the API reference of ``/v1/completions`` and the objects that the official ``openai`` client parses.
Unknown arguments are refused, as OpenAI does, so that a misspelt one is not silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from workloads.serve.engine import FinishReason, Generation

MAX_BODY_BYTES = 2**20
MAX_CHOICES = 8
MAX_SEQUENCES = 64
MAX_STOP = 4
DEFAULT_MAX_TOKENS = 16
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
    "suffix": ("",),
}
"""Arguments that OpenAI has and this server has not, and the values that ask for nothing."""

Prompt = str | tuple[int, ...]


class ApiError(Exception):
    """An answer that is not a completion. ``str()`` is the message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def document(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of ``POST /v1/completions``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    prompt: tuple[Prompt, ...]
    """One or more; token ids are not checked against the vocabulary yet."""
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = ()
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

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
        return tuple(_unbroken(prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and len(stops) > MAX_STOP:
            raise ValueError(f"has {len(stops)} sequences; the limit is {MAX_STOP}")
        return tuple(stops) if isinstance(stops, list) else stops

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def parse_completion(body: bytes) -> CompletionRequest:
    """
    Raises:
        ApiError: 400, naming the argument, its value's fault and the limit.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body of the request is not JSON: {e}") from e
    if not isinstance(document, dict):
        raise ApiError(400, f"The body of the request is JSON, but not an object: {type(document).__name__}.")
    fields = {name: value for name, value in document.items() if value is not None}
    for name in fields:
        if name not in CompletionRequest.model_fields and name not in _NEUTRAL:
            raise ApiError(400, f"Unrecognized request argument supplied: {name[:100]}")
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields.pop(name) not in neutral:
            raise ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported")
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as e:
        raise _fault(e) from e
    if len(request.prompt) * request.n > MAX_SEQUENCES:
        asked = f"{len(request.prompt)} prompts with n = {request.n}"
        raise ApiError(400, f"{asked} are more than {MAX_SEQUENCES} completions at once.", param="n")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true.", param="stream_options")
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
        max_tokens = _max_tokens(request, prompt, context_tokens=context_tokens, vocab_size=vocab_size)
        for _ in range(request.n):
            seed = None if request.seed is None else (request.seed + len(found)) % 2**63
            found.append(
                Generation(
                    prompt=tuple(prompt),
                    max_tokens=max_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    seed=seed,
                    stop=request.stop,
                )
            )
    return found


def choice(index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


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


def model_document(model: str, *, created_s: float) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": int(created_s), "owned_by": "headway"}


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def _max_tokens(request: CompletionRequest, prompt: Sequence[int], *, context_tokens: int, vocab_size: int) -> int:
    if not prompt:
        raise ApiError(400, "The prompt is empty, and this model has no token that begins a text.", param="prompt")
    foreign = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if foreign is not None:
        raise ApiError(400, f"Token id {foreign} is outside the vocabulary, 0 … {vocab_size - 1}.", param="prompt")
    room = context_tokens - len(prompt)
    wanted = request.max_tokens
    if room < 1 or (wanted or 0) > room:
        asked = len(prompt) + (wanted or 1)
        raise ApiError(
            400,
            f"This model's maximum context length is {context_tokens} tokens, however you requested {asked} "
            f"tokens ({len(prompt)} in your prompt; {wanted or 1} for the completion). Shorten one of them.",
            param="prompt" if room < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted or min(DEFAULT_MAX_TOKENS, room)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _unbroken(text: str) -> str:
    """A lone surrogate is valid in JSON, but no character; tokenizers cannot take it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("holds a lone surrogate, which is not a character") from e
    return text


def _fault(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "missing":
        return ApiError(400, f"You must provide a {path} parameter.", param=path)
    shown = json.dumps(fault.get("input"), default=str)[:80] if fault["type"] != "value_error" else ""
    return ApiError(400, f"Invalid value for {path}{shown and f' ({shown})'}: {message}.", param=path)
