"""A conversation as the text of a chat template, and which of it the assistant says.

A template that marks what is generated, by ``{% generation %}``, is believed. For any other, what the assistant says in
a turn is what the template adds, for that turn, to the prompt that the model would have been given there: the
conversation up to it with the generation prompt behind it. So the targets are what the model has to say itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.prepare.records import Conversation, Unusable

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
# Some templates write the day's date into the system prompt. Rows must not depend on the day that they are made on.
_FIXED_DATE = (
    '{% macro strftime_now(format) %}{{ "2024-07-26" if format == "%Y-%m-%d" else "26 Jul 2024" }}{% endmacro %}\n'
)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    text: str
    spans: tuple[tuple[int, int], ...]
    """Where in ``text`` the assistant speaks, in order: characters from … up to but not including."""


class ChatTemplate:
    """The chat template of a tokenizer, a transformers one."""

    def __init__(self, tokenizer: Any) -> None:
        template = tokenizer.get_chat_template()
        self._template = _FIXED_DATE + template if "strftime_now" in template else template
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._end = str(tokenizer.eos_token or "")
        self._marks = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
        self._says_what_is_generated = bool(_GENERATION.search(template))

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation, which ends with the assistant's turn.

        Raises:
            Unusable: the template refuses it, or does not let the assistant's turns be told from the rest.
        """
        if self._says_what_is_generated:
            return self._marked(conversation)
        text, _ = self._fill(conversation)
        spans = tuple(
            self._turn(conversation, number, text)
            for number, message in enumerate(conversation)
            if message["role"] == "assistant"
        )
        return Rendered(text=text, spans=spans)

    def _marked(self, conversation: Conversation) -> Rendered:
        text, marked = self._fill(conversation, spans=True)
        if not any(end > start for start, end in marked):
            raise Unusable("template_marks_nothing")
        # A template may leave the token that ends the turn outside; the model has to say it all the same.
        spans = [
            (start, end + len(self._end) if self._end and text.startswith(self._end, end) else end)
            for start, end in marked
        ]
        return Rendered(text=text, spans=tuple(spans))

    def _turn(self, conversation: Conversation, number: int, text: str) -> tuple[int, int]:
        """Where in ``text``, all of the conversation, its message ``number`` is said."""
        if number == 0:
            raise Unusable("assistant_first")
        prompt, _ = self._fill(conversation[:number], prompt=True)
        is_last = number == len(conversation) - 1
        upto = text if is_last else self._fill(conversation[: number + 1])[0]
        if not upto.startswith(prompt) or not text.startswith(upto):
            raise Unusable("template_rewrites_turns")
        said = upto[len(prompt) :]
        closed = said.rstrip()
        # The line break that many templates put behind the end of a turn is not said by the model, which has ended.
        end = len(prompt) + (len(closed) if closed.endswith(self._marks) else len(said))
        return len(prompt), end

    def _fill(
        self, conversation: Conversation, *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[conversation],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise Unusable("template_refuses") from e
        return texts[0], found[0] if spans else []


def target_mask(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
    """Which tokens hold any character of ``spans``.

    Args:
        offsets: characters of each token, in order, from … up to but not including.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        mask[first : bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])] = True
    return mask
