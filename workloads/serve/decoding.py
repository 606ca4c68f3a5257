"""What happens at each step: choosing the next token of each sequence, and seeing what it brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from workloads.serve.batching_row import Row, Token
from workloads.serve.engine import Generation, Piece
from workloads.serve.text import Detokenizer, StopSequences

_ALL = float("inf")  # above any sum of probabilities


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each row of a batch chooses its next token, on the model's device.

    Made before the model runs, since it copies to the device, which would wait for the model.
    """

    temperatures: Any = None
    """Shape (rows, 1), 1 for rows that do not sample; None where none does."""
    top_p: Any = None
    """Shape (rows, 1); None where all keep all tokens."""
    randoms: tuple[Any, ...] = ()
    """Of each row; None for one that does not sample."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: Any) -> Self:
        asked = [row.generation for row in rows]
        if not any(each.temperature for each in asked):
            return cls()
        cuts = [each.top_p if each.temperature and each.top_p < 1.0 else _ALL for each in asked]
        return cls(
            temperatures=torch.tensor([[each.temperature or 1.0] for each in asked], device=device),
            top_p=None if min(cuts) == _ALL else torch.tensor([[cut] for cut in cuts], device=device),
            randoms=tuple(row.random(device) if row.generation.temperature else None for row in rows),
        )


def choose(logits: Any, sampling: Sampling) -> list[int | None]:
    """The next token of each row, or None where the row's logits are not finite numbers. Waits for the device once.

    Args:
        logits: shape (rows, vocabulary).
    """
    logits = logits.float()
    highest, tokens = logits.max(dim=-1)  # NaN where one is NaN
    finite = torch.isfinite(highest)
    if sampling.temperatures is not None:
        # Subtracted first, so that a tiny temperature gives -inf and never inf.
        shifted = torch.where(finite[:, None], logits - highest[:, None], 0.0)
        probabilities = torch.softmax(shifted / sampling.temperatures, dim=-1)
        if sampling.top_p is not None:
            probabilities = nucleus(probabilities, sampling.top_p)
        for row, random in enumerate(sampling.randoms):
            if random is not None:
                tokens[row : row + 1] = torch.multinomial(probabilities[row], 1, generator=random)
    found: list[int] = torch.where(finite, tokens, -1).tolist()
    return [None if token < 0 else token for token in found]


def nucleus(probabilities: Any, top_p: Any) -> Any:
    """Zero all but the fewest likeliest tokens that together reach ``top_p``, a number or one for each sequence.

    Shape (sequences, vocabulary) in and out; the rest need not sum to 1. Source: Holtzman et al. 2019.
    """
    likeliest, order = probabilities.sort(dim=-1, descending=True)
    before = likeliest.cumsum(dim=-1) - likeliest
    kept = likeliest.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


class Watch:
    """Turns a sequence's tokens into pieces of text, and sees where a stop sequence ends it."""

    def __init__(self, generation: Generation, decode: Callable[[Sequence[int]], str]) -> None:
        self._text, self._stop = Detokenizer(decode), StopSequences(generation.stop)
        self._num_tokens = 0

    def add(self, token: Token) -> Piece:
        """What the token brought. After a piece with a finish reason there are no more."""
        self._num_tokens += 1
        reason = token.finish_reason
        text = "" if reason == "stop" else self._stop.add(self._text.add(token.id))
        if self._stop.hit:
            reason = "stop"
        if reason is not None:
            text += self._stop.add(self._text.flush())
            text += self._stop.flush()
            reason = "stop" if self._stop.hit else reason
        return Piece(text=text, num_tokens=self._num_tokens, finish_reason=reason)
