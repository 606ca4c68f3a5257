"""A loaded version's first answer, to nobody: what is broken or far too slow is found out before it gets a request."""

from __future__ import annotations

import asyncio
import time

from orchestrator.errors import RunError
from workloads.serve.classifier import Classifier
from workloads.serve.engine import Engine, Generation

WARM_UP_TOKENS = 16
_PROMPT = "The"


class TooSlow(RunError):
    """A version took longer for its first answer than it may."""


def warm_up(engine: Engine | Classifier, *, max_s: float) -> float:
    """Answer once. Returns the seconds that it took.

    Raises:
        NonFiniteLogits: the model is broken. TooSlow: it took more than ``max_s``.
    """
    begun_s = time.monotonic()
    asyncio.run(_answer(engine, max_s))
    return time.monotonic() - begun_s


async def _answer(engine: Engine | Classifier, max_s: float) -> None:
    try:
        async with asyncio.timeout(max_s):
            tokens = await engine.encode(_PROMPT)
            if isinstance(engine, Classifier):
                await engine.classify([tokens])
                return
            num_tokens = max(1, min(WARM_UP_TOKENS, engine.context_tokens - len(tokens)))
            generation = Generation(prompt=tuple(tokens or (0,)), max_tokens=num_tokens, temperature=0.0)
            async for _ in engine.generate(generation):
                pass
    except TimeoutError as e:
        raise TooSlow(
            f"Its first {WARM_UP_TOKENS} tokens, or its first class, took more than {max_s:g} s.",
            next_step="Raise the application's max_warm_up_s if it may be so slow.",
        ) from e
