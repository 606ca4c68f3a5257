"""What can go wrong with one S3 request on its way, as a value: chosen by a rule, told in words, drawn from a seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    CUT_BEFORE = "is cut before the server gets it"
    CUT_REQUEST = "is cut in the request's body"
    LOSE_ANSWER = "is carried out, and cut before the answer"
    CUT_ANSWER = "is cut in the answer's body"
    STALL = "stalls in the answer's body"
    DELAY = "is delayed"
    FLIP_REQUEST = "has a byte of the request's body flipped"
    FLIP_ANSWER = "has a byte of the answer's body flipped"
    REFUSE = "is refused"


CODES = {
    404: "NoSuchUpload",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
}
"""What ``REFUSE`` answers: status → S3's code for it."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault, and the requests that it meets: the ``nth`` that matches (from 1) and ``times - 1`` more.

    ``key`` and ``query`` are regular expressions searched in the object's key (as sent, with the store's prefix; empty
    for what is asked of the bucket) and in the query. Offsets past a body's end mean its last byte.
    """

    kind: Kind
    method: str = ""
    key: str = ""
    query: str = ""
    nth: int = 1
    times: int = 1
    at_bytes: int = 0
    """Bytes of the body before the cut, the stall, or the flipped byte."""
    wait_s: float = 0.0
    """Length of the delay or the stall."""
    status: int = 0
    """What ``REFUSE`` answers: one of ``CODES``."""

    def __post_init__(self) -> None:
        if (self.kind is Kind.REFUSE) != (self.status in CODES):
            raise ValueError(f"status is one of {sorted(CODES)} for REFUSE, and only there; it is {self.status}")

    def matches(self, method: str, key: str, query: str) -> bool:
        named = not self.method or self.method == method
        return named and bool(re.search(self.key, key)) and bool(re.search(self.query, query))

    def __str__(self) -> str:
        which = f"request {self.nth}" if self.times == 1 else f"requests {self.nth} to {self.nth + self.times - 1}"
        rule = [self.method] if self.method else []
        rule += [f"{name} ~ {pattern!r}" for name, pattern in (("key", self.key), ("query", self.query)) if pattern]
        details = {
            Kind.REFUSE: f" with {self.status}",
            Kind.DELAY: f" by {self.wait_s:g} s",
            Kind.STALL: f" for {self.wait_s:g} s after {self.at_bytes:,} bytes",
            Kind.CUT_BEFORE: "",
            Kind.LOSE_ANSWER: "",
        }
        return (
            f"{which} of {' '.join(rule) or 'all'} {self.kind}{details.get(self.kind, f' at {self.at_bytes:,} bytes')}"
        )


def random_fault(rng: Random, *, max_nth: int = 20, max_bytes: int = 2**24, stall_s: float = 5.0) -> Fault:
    """A fault of any kind, for one of the first ``max_nth`` requests; offsets spread over all orders of magnitude.

    A 404 is not among them: a server that denies what it holds cannot be told from one that lost it.
    """
    kind = rng.choice(list(Kind))
    return Fault(
        kind=kind,
        nth=rng.randint(1, max_nth),
        at_bytes=int(max_bytes ** rng.random()) - 1,
        wait_s={Kind.DELAY: rng.uniform(0.0, 0.5), Kind.STALL: stall_s}.get(kind, 0.0),
        status=rng.choice([409, 412, 500, 503]) if kind is Kind.REFUSE else 0,
    )


def passing_fault(rng: Random) -> Fault:
    """A fault of a kind that a second try of the same request puts right."""
    kind = rng.choice([Kind.CUT_BEFORE, Kind.LOSE_ANSWER, Kind.CUT_ANSWER, Kind.REFUSE])
    return Fault(kind=kind, at_bytes=rng.randrange(2**16), status=rng.choice([500, 503]) if kind is Kind.REFUSE else 0)
