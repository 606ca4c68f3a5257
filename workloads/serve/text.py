"""From tokens that come one at a time to text that can be sent. Pure.

A character may be spread over several tokens, so its first bytes decode to U+FFFD until the rest is there. A stop
sequence may be spread over several pieces. Both are held back until it is known what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"


class Detokenizer:
    """Incremental ``decode``: the pieces join to ``decode`` of all tokens, and none ends inside a character.

    Decodes a window that begins one piece back, so that decoders which treat the first token of a text apart
    (a stripped leading space, say) see the same context as in the whole text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # ids before this one are no longer looked at
        self._emitted = 0  # ids before this one have been emitted
        self._emitted_text = ""  # decode of the window's emitted part

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(self._emitted_text) or text.endswith(_BROKEN):
            return ""
        piece = text[len(self._emitted_text) :]
        self._context, self._emitted = self._emitted, len(self._ids)
        self._emitted_text = self._decode(self._ids[self._context :])
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text = self._decode(self._ids[self._context :])
        piece = text[len(self._emitted_text) :]
        self._context = self._emitted = len(self._ids)
        self._emitted_text = ""
        return piece


class StopSequences:
    """Cuts a text that comes in pieces before the first of several stop sequences."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.hit = False

    def add(self, piece: str) -> str:
        """The text that is certain not to be the beginning of a stop sequence."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back for a stop sequence that never came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
