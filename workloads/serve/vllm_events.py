"""What vLLM says of a completion, and what it is asked. Pure.

Source: ``LLMServer.completions`` of Ray 2.60, ``ray/llm/_internal/serve/core/server/llm_server.py``: a streamed request
gives lists of server-sent events in OpenAI's format, or an error object in the place of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from orchestrator.errors import RunError
from workloads.serve.engine import FinishReason, Generation, Piece

_PREFIX, _END = "data: ", "[DONE]"


class EngineFailed(RunError):
    """vLLM answered with an error."""


def completion_arguments(generation: Generation, *, model_id: str, end_tokens: Iterable[int]) -> dict[str, Any]:
    """The arguments of vLLM's ``CompletionRequest`` for one sequence."""
    return {
        "model": model_id,
        "prompt": list(generation.prompt),
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "seed": generation.seed,
        "stop": list(generation.stop),
        "stop_token_ids": sorted({*end_tokens, *generation.end_tokens}),
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def pieces(items: Any, *, num_tokens: int) -> Iterator[Piece]:
    """The pieces in one item of the stream.

    Args:
        items: a list of events, one event, or an error.
        num_tokens: generated before these, for events that do not say it.

    Raises:
        EngineFailed: one of them is an error, or is not understood.
    """
    for item in items if isinstance(items, list) else [items]:
        for document in _documents(item):
            for choice in document.get("choices", ()):
                usage = document.get("usage") or {}
                num_tokens = int(usage.get("completion_tokens") or num_tokens + 1)
                yield Piece(
                    text=str(choice.get("text") or ""),
                    num_tokens=num_tokens,
                    finish_reason=_reason(choice.get("finish_reason")),
                )


def _documents(item: Any) -> Iterator[dict[str, Any]]:
    error = getattr(item, "error", None)
    if error is not None:
        raise EngineFailed(f"vLLM answered with an error: {getattr(error, 'message', error)}")
    if not isinstance(item, str):
        raise EngineFailed(f"vLLM answered with {type(item).__name__}, which is no event.")
    for line in item.splitlines():
        text = line.removeprefix(_PREFIX).strip()
        if not line.startswith(_PREFIX) or text == _END:
            continue
        document = json.loads(text)
        if "error" in document:
            raise EngineFailed(f"vLLM answered with an error: {document['error'].get('message')}")
        yield document


def _reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason not in ("stop", "length"):
        raise EngineFailed(f"vLLM ended a sequence for a reason of its own: {reason}.")
    return "stop" if reason == "stop" else "length"
