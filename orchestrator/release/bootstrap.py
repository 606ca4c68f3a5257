"""How sure it is that one model's loss is lower than another's on the same samples: a paired bootstrap. Pure.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals; Koehn, Statistical
Significance Tests for Machine Translation Evaluation (2004), for pairs. What is drawn again are blocks of samples that
lie side by side, since the targets of one text are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MIN_BLOCKS = 8
"""With fewer, resampling says nothing."""
_NUM_RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**22  # numbers in memory
_SEED = 0xB007


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Of the difference in loss per target, the new model's less the other's: below 0 the new one is better."""

    difference: float
    low: float
    high: float
    """Between them lies the difference with a confidence of :data:`CONFIDENCE`."""


def paired_interval(mine: Sequence[float], theirs: Sequence[float], num_targets: Sequence[int]) -> Interval | None:
    """The interval of the difference in loss per target; None with fewer than :data:`MIN_BLOCKS` blocks.

    Args:
        mine: the sum of the new model's losses over each block's targets, nats; shape (K,).
        theirs: the other model's, over the same blocks.
        num_targets: of each block.

    Raises:
        ValueError: the blocks are not the same.
    """
    if not len(mine) == len(theirs) == len(num_targets):
        raise ValueError(f"{len(mine)}, {len(theirs)} and {len(num_targets)} blocks are not the same ones")
    differences = np.asarray(mine, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    targets = np.asarray(num_targets, dtype=np.float64)
    num_blocks = len(targets)
    if num_blocks < MIN_BLOCKS:
        return None
    random = np.random.default_rng(_SEED)
    drawn: list[float] = []
    at_once = max(1, _DRAWN_AT_ONCE // num_blocks)
    while len(drawn) < _NUM_RESAMPLES:
        num_rows = min(at_once, _NUM_RESAMPLES - len(drawn))
        rows = random.integers(num_blocks, size=(num_rows, num_blocks))
        drawn += (differences[rows].sum(axis=1) / targets[rows].sum(axis=1)).tolist()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(difference=float(differences.sum() / targets.sum()), low=float(low), high=float(high))
