"""Control tokens that people write into messages. They stay text, as they do where the model is served.

Only the chat template may start or end a turn. So a control token within a message is put between two marks, private
characters of Unicode, before the template sees it, and what stands between marks becomes the tokens of its letters.
transformers does the same under ``sanitize_control_tokens``, but does not say where in the text its tokens lie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from workloads.prepare.records import Conversation

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_NO_MARKS = str.maketrans("", "", _OPEN + _CLOSE)


class Tokens(NamedTuple):
    """A tokenized text."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    """Characters of each token, in order: from … up to but not including."""


class Literals:
    """The control tokens of a transformers tokenizer, and texts that hold some of them as text.

    Special tokens are control tokens in every message. Other added tokens that the template writes, such as the borders
    of a model's thoughts, are so in all but the assistant's own.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        special = [token.content for token in added if token.special]
        self._of_assistant = _any_of(special)
        self._of_others = _any_of([*special, *(token.content for token in added if token.content in template)])
        self._marked = re.compile(f"{_OPEN}({self._of_others.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        self._backend = tokenizer.backend_tokenizer
        self._newline: list[int] = self._backend.encode("\n", add_special_tokens=False).ids

    def mark(self, conversation: Conversation) -> Conversation:
        """The conversation with marks around the control tokens in its messages, and none elsewhere."""
        return [{**message, "content": self._mark(message)} for message in conversation]

    def has_special(self, text: str) -> bool:
        """Whether a special token stands in ``text``, marked or not."""
        return self._of_assistant.search(text) is not None

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of texts with marks and without."""
        has_marks = [_OPEN in text or _CLOSE in text for text in texts]
        plain = [text for text, marks in zip(texts, has_marks, strict=True) if not marks]
        encodings = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        return [
            self._encode(text) if marks else Tokens((found := next(encodings)).ids, found.offsets)
            for text, marks in zip(texts, has_marks, strict=True)
        ]

    def _mark(self, message: dict[str, str]) -> str:
        control = self._of_assistant if message["role"] == "assistant" else self._of_others
        return control.sub(f"{_OPEN}\\g<0>{_CLOSE}", without_marks(message["content"]))

    def _encode(self, text: str) -> Tokens:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        for found in self._marked.finditer(text):
            self._append(text, done, found.start(), ids, offsets)
            letters = self._letters(found[1] or "")
            ids += letters
            offsets += [found.span()] * len(letters)
            done = found.end()
        self._append(text, done, len(text), ids, offsets)
        return Tokens(ids, offsets)

    def _append(self, text: str, start: int, end: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        """Append the tokens of ``text[start:end]``, which has no marks."""
        if start == end:
            return
        # SentencePiece puts a blank before the first word of what it is given, unless a line break stands there.
        shift, skip = (start - 1, len(self._newline)) if start else (0, 0)
        encoding = self._backend.encode(("\n" if start else "") + text[start:end], add_special_tokens=False)
        if encoding.ids[:skip] != self._newline[:skip]:
            shift, skip = start, 0
            encoding = self._backend.encode(text[start:end], add_special_tokens=False)
        ids += encoding.ids[skip:]
        offsets += [(first + shift, last + shift) for first, last in encoding.offsets[skip:]]

    def _letters(self, token: str) -> list[int]:
        """The tokens of a control token's letters."""
        if not token:
            return []
        ids = self._without_added("\n" + token)
        skip = len(self._newline)
        return ids[skip:] if ids[:skip] == self._newline else self._without_added(token)

    def _without_added(self, text: str) -> list[int]:
        """Tokens of the vocabulary alone, as if no token had been added to it."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._backend.model.tokenize(word)]


def without_marks(text: str) -> str:
    return text.translate(_NO_MARKS) if _OPEN in text or _CLOSE in text else text


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
