"""A conversation as the model's own chat template writes it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import HeadwayError

_LOCK = threading.Lock()  # a transformers tokenizer switches its settings while it encodes


class NoChatTemplate(HeadwayError):
    """The model's tokenizer has no chat template."""


class TemplateRefused(HeadwayError):
    """The chat template does not take these messages, and says why."""


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation and of the beginning of the assistant's next turn.

    What a message says is text throughout: an end-of-turn mark that someone writes into one ends no turn.

    Raises:
        NoChatTemplate, TemplateRefused
    """
    from jinja2 import TemplateError

    try:
        tokenizer.get_chat_template()
    except ValueError as e:
        raise NoChatTemplate("This model has no chat template, so it cannot be chatted with.") from e
    try:
        with _LOCK:
            ids: list[int] = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
    except (TemplateError, TypeError, ValueError, KeyError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise TemplateRefused(f"This model's chat template does not take these messages: {reason[0][:300]}") from e
    return ids
