"""The format of ``/v1/classify``. Pure.

OpenAI has no such endpoint. What comes back has the form of its lists, as vLLM's endpoint of this name has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from workloads.serve.openai_api import MAX_SEQUENCES, ApiError, parse, unbroken, usage


class ClassifyRequest(BaseModel):
    """The body of ``POST /v1/classify``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str | None = None
    """None is the one that is served."""
    input: tuple[str, ...]
    """One text or more."""
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: object) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("must be a text, or a list of texts")
        if len(texts) > MAX_SEQUENCES:
            raise ValueError(f"has {len(texts)} texts; the limit is {MAX_SEQUENCES}")
        return tuple(unbroken(text) for text in texts)


def parse_classify(body: bytes) -> ClassifyRequest:
    """
    Raises:
        ApiError: 400, naming the argument, its value's fault and the limit.
    """
    return parse(body, ClassifyRequest, neutral={})


def require_fit(texts: Sequence[Sequence[int]], *, context_tokens: int) -> None:
    """
    Raises:
        ApiError: 400, a text without a token, or one that is too long for the model.
    """
    for index, text in enumerate(texts):
        if not text:
            raise ApiError(400, f"Text {index} of input is empty.", param="input")
        if len(text) > context_tokens:
            raise ApiError(
                400,
                f"This model's maximum context length is {context_tokens} tokens, however text {index} of input has "
                f"{len(text)}. Shorten it.",
                param="input",
                code="context_length_exceeded",
            )


def classification(
    id_: str,
    *,
    created_s: float,
    model: str,
    labels: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    num_tokens: int,
) -> dict[str, Any]:
    """The answer: of each text its likeliest label, that one's probability, and those of all."""
    data = []
    for index, scores in enumerate(probabilities):
        best = max(range(len(labels)), key=lambda number: scores[number])
        by_label = dict(zip(labels, scores, strict=True))
        data.append({"index": index, "label": labels[best], "score": scores[best], "scores": by_label})
    return {
        "id": id_,
        "object": "list",
        "created": int(created_s),
        "model": model,
        "data": data,
        "usage": usage(num_tokens, 0),
    }
