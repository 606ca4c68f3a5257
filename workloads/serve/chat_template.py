"""A conversation as the model's own chat template writes it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import HeadwayError

_LOCK = threading.Lock()  # a transformers tokenizer switches its settings while it encodes
_QUESTION, _ANSWER = "Which word?", "Headway."


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
    if not ids:
        raise TemplateRefused("This model's chat template makes nothing of these messages.")
    return ids


def turn_end_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end the assistant's turn: the eos token, and the one that the template writes there.

    The two differ where a template was put beside a model that had none. Fine-tuning teaches the template's.
    """
    eos = tokenizer.eos_token_id
    return tuple(dict.fromkeys(int(token) for token in (_template_end(tokenizer), eos) if token is not None))


def _template_end(tokenizer: Any) -> int | None:
    """The added token that the template writes behind what the assistant says; None where it writes none."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        with _LOCK:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):  # there is none, or it wants other messages
        return None
    _, found, behind = text.rpartition(_ANSWER)
    if not found:
        return None
    behind = behind.lstrip()
    marks = {str(token.content): int(number) for number, token in tokenizer.added_tokens_decoder.items()}
    ends = [mark for mark in marks if mark.strip() and behind.startswith(mark)]
    return marks[max(ends, key=len)] if ends else None
