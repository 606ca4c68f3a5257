"""The learning rate at a step. Pure, and stateless: a resumed run needs nothing but the step's number."""

from __future__ import annotations

import math

from orchestrator.spec import OptimizerSpec


def learning_rate(optimizer: OptimizerSpec, *, step: int, total_steps: int) -> float:
    """The learning rate of the update of ``step``, counted from 0.

    It climbs in a straight line over ``warmup_steps`` updates, which are all below the peak and above 0, and is
    ``learning_rate`` at step ``warmup_steps``. From there ``constant`` stays, and ``linear`` and ``cosine``
    (Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts) fall to ``min_learning_rate_ratio`` of it at the
    last step, ``total_steps - 1``. A step past the last keeps the last one's rate.

    Raises:
        ValueError: ``step`` is negative, or ``total_steps`` is not above ``warmup_steps``.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if step < 0 or total_steps <= warmup:
        raise ValueError(f"step {step} of {total_steps} with {warmup} warm-up steps: there is no such step")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return peak
    decay_steps = total_steps - 1 - warmup
    progress = min(1.0, (step - warmup) / decay_steps) if decay_steps else 0.0
    left = 1.0 - progress if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = optimizer.min_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * left)
