"""What happens at each token of a sequence: choosing it, and seeing what it brought."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from workloads.serve.engine import FinishReason, Generation, Piece
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.text import Detokenizer, StopSequences


class Choose(transformers.LogitsProcessor):  # type: ignore[misc]
    """Samples with the request's own random numbers: ``generate`` samples from torch's global ones, which
    requests share. Its greedy search then finds the one token that is left."""

    def __init__(self, generation: Generation, device: Any) -> None:
        self._temperature, self._top_p = generation.temperature, generation.top_p
        self._random = torch.Generator(device=device)
        if generation.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(generation.seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shape (1, vocabulary) in and out."""
        logits = scores.float()
        highest = logits.max(dim=-1, keepdim=True).values
        if not bool(torch.isfinite(highest).all()):
            raise NonFiniteLogits("The model's logits are not finite numbers.")
        if self._temperature == 0.0:
            return scores
        # Subtracted first, so that a tiny temperature gives -inf and never inf.
        probabilities = torch.softmax((logits - highest) / self._temperature, dim=-1)
        if self._top_p < 1.0:
            probabilities = nucleus(probabilities, self._top_p)
        token = torch.multinomial(probabilities, 1, generator=self._random)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


class Watch(transformers.StoppingCriteria):  # type: ignore[misc]
    """Sees every new token: turns it into text, passes it on, and says when to stop."""

    def __init__(
        self,
        generation: Generation,
        decode: Callable[[Sequence[int]], str],
        end_tokens: Sequence[int],
        put: Callable[[Piece], None],
        gone: threading.Event,
    ) -> None:
        self._max_tokens = generation.max_tokens
        self._text, self._stop = Detokenizer(decode), StopSequences(generation.stop)
        self._end_tokens, self._put, self._gone = frozenset(end_tokens), put, gone
        self._num_tokens = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        token = int(input_ids[0, -1])
        self._num_tokens += 1
        ended = token in self._end_tokens
        text = "" if ended else self._stop.add(self._text.add(token))
        reason: FinishReason | None = "stop" if ended or self._stop.hit else None
        if reason is None and self._num_tokens >= self._max_tokens:
            reason = "length"
        if reason is not None:
            text += self._stop.add(self._text.flush())
            text += self._stop.flush()
            reason = "stop" if self._stop.hit else reason
        self._put(Piece(text=text, num_tokens=self._num_tokens, finish_reason=reason))
        return torch.tensor([reason is not None or self._gone.is_set()], device=input_ids.device)


def nucleus(probabilities: Any, top_p: float) -> Any:
    """Zero all but the fewest likeliest tokens that together reach ``top_p``.

    Shape (sequences, vocabulary) in and out; the rest need not sum to 1. Source: Holtzman et al. 2019.
    """
    likeliest, order = probabilities.sort(dim=-1, descending=True)
    before = likeliest.cumsum(dim=-1) - likeliest
    kept = likeliest.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
