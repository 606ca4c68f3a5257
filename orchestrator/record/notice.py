"""What a webhook is told of a run: one sentence for people, the facts for programs, and a signature. Pure."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from dataclasses import dataclass, field
from typing import Any

from orchestrator.release.outcome import Outcome
from orchestrator.spec import NoticeEvent

FORMAT = "headway/notice/1"
SIGNATURE_HEADER = "Headway-Signature"
MAX_TEXT = 2000
"""Characters; a longer sentence is cut. The reason is not."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One thing that a webhook is told."""

    event: NoticeEvent
    run_id: str
    sentence: str
    reason: str = ""
    version: str | None = None
    """``NAME@NUMBER`` of what was released, or rejected."""
    attempt: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    claim: str
    """The claim's name, under which the notice goes out once."""

    def body(self, *, store: str, time_s: float) -> bytes:
        """The JSON document that is posted. ``text`` is what chat servers show.

        Figures that are no finite numbers are null.
        """
        document = {
            "format": FORMAT,
            "text": _escaped(self.sentence),
            "event": self.event,
            "run_id": self.run_id,
            "name": self.run_id.rpartition("-")[0],
            "attempt": self.attempt,
            "reason": self.reason,
            "version": self.version,
            "figures": {name: value if math.isfinite(value) else None for name, value in self.figures.items()},
            "store": store,
            "time_s": round(time_s, 3),
        }
        return json.dumps(document, allow_nan=False).encode()  # in ASCII: a reason may quote a name that is no UTF-8


def signature(body: bytes, secret: str) -> str:
    """The value of :data:`SIGNATURE_HEADER`: HMAC (RFC 2104) with SHA-256 of the body as it was sent."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def of_outcome(outcome: Outcome) -> Notice:
    """That a run has ended for good."""
    version = outcome.facts.get("version")
    figures = numbers(outcome.facts.get("evaluation", {}))
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    sentence = {
        "done": f"{outcome.run_id} is done: " + ", ".join(filter(None, [version, shown or "nothing was evaluated"])),
        "refused": f"{outcome.run_id} was refused by the gate: {outcome.reason}",
        "failed": f"{outcome.run_id} failed for good: {outcome.reason}",
    }[outcome.state]
    return Notice(
        event=outcome.state,
        run_id=outcome.run_id,
        sentence=sentence,
        reason=outcome.reason,
        version=version,
        attempt=outcome.attempt,
        figures=figures,
        claim=outcome.state,
    )


def attempt_failed(run_id: str, attempt: int, reason: str) -> Notice:
    """That an attempt failed, and that nothing starts the next one by itself."""
    return Notice(
        event="failed",
        run_id=run_id,
        sentence=f"Attempt {attempt} of {run_id} failed, and nothing starts it again by itself: {reason}",
        reason=reason,
        attempt=attempt,
        claim=f"failed-{attempt:05d}",
    )


def stalled(run_id: str, attempt: int, *, step: int, seconds: float) -> Notice:
    """That training makes no step. ``step`` is the last one that was begun, 0 where none was."""
    last = f"; it is at step {step}" if step else "; no worker has begun to train"
    return Notice(
        event="stalled",
        run_id=run_id,
        sentence=f"{run_id} has made no step for {seconds / 60:.0f} minutes{last}.",
        reason=f"no step for {seconds:.0f} s",
        attempt=attempt,
        figures={"step": step, "seconds": round(seconds, 1)},
        claim=f"stalled-{attempt:05d}",
    )


def rejected(run_id: str, model: str, number: int, *, channel: str, reason: str) -> Notice:
    """That the server takes a version for bad."""
    return Notice(
        event="rejected",
        run_id=run_id,
        sentence=f"{model}@{number} was rejected on channel {channel}, and gets no requests: {reason}",
        reason=reason,
        version=f"{model}@{number}",
        claim=f"rejected-{number:05d}-{channel}",
    )


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """Those of an evaluation's figures that are numbers."""
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def _escaped(sentence: str) -> str:
    """Slack's own rule for text (docs.slack.dev, "Formatting message text"): else a file's name could call everyone."""
    cut = sentence if len(sentence) <= MAX_TEXT else sentence[: MAX_TEXT - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
