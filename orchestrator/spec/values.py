"""Kinds of values that several parts of the run file hold, and the one way in which values become bytes."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from orchestrator.document import ENV_NAME, NAME

MAX_NAME = 31  # a run's id is the name, a dash and 8 digits, at most 40 characters

Name = Annotated[str, Field(pattern=NAME, max_length=MAX_NAME)]
EnvName = Annotated[str, Field(pattern=ENV_NAME)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Metric = Annotated[str, Field(min_length=1)]


def require_json(value: Any) -> None:
    """
    Raises:
        ValueError: it holds what JSON cannot say.
    """
    try:
        canonical_json(value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"holds what JSON cannot say: {e}") from e


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
