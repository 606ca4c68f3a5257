"""What the requests in OpenAI's format have in common: checked arguments, errors, usage, events. Pure.

Source: the API reference, and the objects that the official ``openai`` client parses. Unknown arguments are refused,
as OpenAI does, so that a misspelt one is not silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from workloads.serve.engine import Generation

MAX_BODY_BYTES = 2**20
MAX_CHOICES = 8
MAX_SEQUENCES = 64
MAX_STOP = 4

Neutral = Mapping[str, tuple[Any, ...]]
"""Arguments that OpenAI has and this server has not, and the values that ask for nothing."""


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


class SamplingRequest(BaseModel):
    """The arguments of every request that generates."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

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


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(body: bytes, kind: type[Parsed], *, neutral: Neutral) -> Parsed:
    """A request's body as ``kind``. null asks for nothing.

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
        if name not in kind.model_fields and name not in neutral:
            raise ApiError(400, f"Unrecognized request argument supplied: {name[:100]}")
    for name, values in neutral.items():
        if name in fields and fields.pop(name) not in values:
            raise ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported")
    try:
        request = kind.model_validate(fields)
    except ValidationError as e:
        raise _fault(e) from e
    if isinstance(request, SamplingRequest) and request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true.", param="stream_options")
    return request


def generation(
    request: SamplingRequest,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    number: int,
    end_tokens: tuple[int, ...] = (),
) -> Generation:
    """What to generate for one sequence of the request, the ``number``-th, which has a seed of its own."""
    return Generation(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=None if request.seed is None else (request.seed + number) % 2**63,
        stop=request.stop,
        end_tokens=end_tokens,
    )


def room_for(wanted: int | None, num_prompt_tokens: int, *, context_tokens: int, param: str) -> int:
    """Tokens that the model may generate after the prompt: all that ``wanted`` asks for, or what there is room for.

    Args:
        param: the argument that holds the prompt.

    Raises:
        ApiError: 400, prompt and completion are too long for the model's context together.
    """
    room = context_tokens - num_prompt_tokens
    if room >= max(1, wanted or 0):
        return wanted or room
    asked = num_prompt_tokens + (wanted or 1)
    raise ApiError(
        400,
        f"This model's maximum context length is {context_tokens} tokens, however you requested {asked} "
        f"tokens ({num_prompt_tokens} in your prompt; {wanted or 1} for the completion). Shorten one of them.",
        param=param if room < 1 else "max_tokens",
        code="context_length_exceeded",
    )


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def model_document(model: str, *, created_s: float) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": int(created_s), "owned_by": "headway"}


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def unbroken(text: str) -> str:
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
