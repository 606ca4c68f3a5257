"""A conversation as the text of a chat template, and which of it the assistant says.

A template that marks what is generated, by ``{% generation %}``, is believed. For any other, what the assistant says in
a turn is what the template adds, for that turn, to the prompt that the model would have been given there: the
conversation up to it with the generation prompt behind it. So the targets are what the model has to say itself.

A template may write a turn otherwise once more follow, as those do that leave out earlier thoughts. Then no text of the
whole conversation holds every turn as it was said, and each turn gets a text of its own: the conversation up to it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.prepare.literals import Literals
from workloads.prepare.records import Conversation, Unusable

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_MANY_TURNS = 3  # from here on it pays to look at them together
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
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
        self._marks = tuple(sorted(added, key=len, reverse=True))
        self._says_what_is_generated = bool(_GENERATION.search(template))
        self.literals = Literals(tokenizer, template)

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """The conversation, which ends with the assistant's turn, in one text, or in one for each of its turns.

        Raises:
            Unusable: the template refuses it, or does not let the assistant's turns be told from the rest.
        """
        try:
            return [self.render(conversation)]
        except Unusable as e:
            if e.reason != "template_rewrites_turns":
                raise
        turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        return [self._last_turn(self.literals.mark(conversation[: number + 1])) for number in turns]

    def render(self, conversation: Conversation) -> Rendered:
        """All of the conversation in one text.

        Raises:
            Unusable: as :meth:`samples`, or no one text holds every turn as it was said.
        """
        conversation = self.literals.mark(conversation)
        if self._says_what_is_generated:
            return self._marked(conversation)
        if conversation[0]["role"] == "assistant":
            raise Unusable("assistant_first")
        text, _ = self._fill(conversation)
        turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        spans = self._alike(conversation, turns, text) if len(turns) >= _MANY_TURNS else None
        return Rendered(text=text, spans=spans or tuple(self._turn(conversation, number, text) for number in turns))

    def _marked(self, conversation: Conversation) -> Rendered:
        text, marked = self._fill(conversation, spans=True)
        if not any(end > start for start, end in marked):
            raise Unusable("template_marks_nothing")
        # A template may leave the token that ends the turn outside; the model has to say it all the same. Behind the
        # last turn nothing else can stand.
        ends = next((mark for mark in self._marks if text.startswith(mark, marked[-1][1])), "")
        spans = [(start, end + len(ends) if text.startswith(ends, end) else end) for start, end in marked]
        return Rendered(text=text, spans=tuple(spans))

    def _last_turn(self, conversation: Conversation) -> Rendered:
        text, _ = self._fill(conversation)
        return Rendered(text=text, spans=(self._turn(conversation, len(conversation) - 1, text),))

    def _alike(self, conversation: Conversation, turns: list[int], text: str) -> tuple[tuple[int, int], ...] | None:
        """The spans of many turns that are all written like the last one; None where they are not.

        To look at a turn by itself, as :meth:`_turn` does, is to render all that comes before it, twice. Here the last
        turn is looked at so, and the others are found between a header and an ending like its own. Both hold a control
        token, which nobody but the template can have written. The first turn's prompt shows whether the template
        leaves prompts as they are once more follows.
        """
        last = self._turn(conversation, turns[-1], text)
        prompt, _ = self._fill(conversation[: turns[0]], prompt=True)
        before, _ = self._fill(conversation[: turns[-1]])
        content = _written(conversation[turns[-1]]["content"], text, last[0])
        if content is None or not text.startswith(before) or not text.startswith(prompt):
            return None
        header, ending = text[len(before) : last[0]], text[last[0] + len(content) : last[1]]
        if not self.literals.has_special(header) or not self.literals.has_special(ending):
            return None
        spans = []
        done = 0
        for number in turns:
            found = text.find(header, done)
            start = found + len(header)
            content = _written(conversation[number]["content"], text, start, ending=ending)
            if found < 0 or content is None:
                return None
            done = start + len(content) + len(ending)
            spans.append((start, done))
        return tuple(spans) if (spans[0][0], spans[-1]) == (len(prompt), last) else None

    def _turn(self, conversation: Conversation, number: int, text: str) -> tuple[int, int]:
        """Where in ``text``, all of the conversation, its message ``number`` is said."""
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
            raise Unusable("template_refuses", (str(e).strip().splitlines() or [type(e).__name__])[0]) from e
        return texts[0], found[0] if spans else []


def _written(content: str, text: str, start: int, *, ending: str = "") -> str | None:
    """How a template writes ``content`` at this place of ``text``: as it is, trimmed, or otherwise, which is None."""
    return next((said for said in (content, content.strip()) if text.startswith(said + ending, start)), None)


def target_mask(offsets: Sequence[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
    """Which tokens hold any character of ``spans``.

    Args:
        offsets: characters of each token, in order, from … up to but not including.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        mask[first : bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])] = True
    return mask
