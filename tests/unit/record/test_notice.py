"""What a webhook is told: a sentence, the facts, a signature."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest

from orchestrator.record import notice
from orchestrator.record.notice import MAX_TEXT, Notice, signature
from orchestrator.release.outcome import Outcome

RUN = "demo-lm-1a2b3c4d"


def outcome(state: Any, reason: str = "", **facts: Any) -> Outcome:
    return Outcome(run_id=RUN, state=state, reason=reason, attempt=2, facts=facts, ended_s=1.0)


def posted(told: Notice) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told.body(store="s3://bucket/prefix", time_s=5.00049))
    return found


def test_a_released_run_tells_version_and_figures() -> None:
    evaluation = {"loss": 2.3456789, "accuracy": 0.5, "classes": ["a"], "sure": True}
    assert posted(notice.of_outcome(outcome("done", version="demo-lm@3", evaluation=evaluation))) == {
        "format": "headway/notice/1",
        "text": "demo-lm-1a2b3c4d is done: demo-lm@3, loss 2.346, accuracy 0.5",
        "event": "done",
        "run_id": RUN,
        "name": "demo-lm",
        "attempt": 2,
        "reason": "",
        "version": "demo-lm@3",
        "figures": {"loss": 2.3456789, "accuracy": 0.5},
        "store": "s3://bucket/prefix",
        "time_s": 5.0,
    }


@pytest.mark.parametrize(
    ("told", "event", "text", "claim"),
    [
        (
            notice.of_outcome(outcome("refused", "loss 5.0 is above 4.0")),
            "refused",
            f"{RUN} was refused by the gate: loss 5.0 is above 4.0",
            "refused",
        ),
        (
            notice.of_outcome(outcome("failed", "the loss is nan")),
            "failed",
            f"{RUN} failed for good: the loss is nan",
            "failed",
        ),
        (
            notice.attempt_failed(RUN, 2, "S3 is down"),
            "failed",
            f"Attempt 2 of {RUN} failed, and nothing starts it again by itself: S3 is down",
            "failed-00002",
        ),
        (
            notice.stalled(RUN, 1, step=40, seconds=1830.0),
            "stalled",
            f"{RUN} has made no step for 30 minutes; it is at step 40.",
            "stalled-00001",
        ),
        (
            notice.stalled(RUN, 1, step=0, seconds=1830.0),
            "stalled",
            f"{RUN} has made no step for 30 minutes; no worker has begun to train.",
            "stalled-00001",
        ),
        (
            notice.rejected(RUN, "lm", 3, channel="production", reason="odd weights"),
            "rejected",
            "lm@3 was rejected on channel production, and gets no requests: odd weights",
            "rejected-00003-production",
        ),
    ],
)
def test_each_event_has_its_sentence_and_its_claim(told: Notice, event: str, text: str, claim: str) -> None:
    assert (told.event, told.claim, posted(told)["text"]) == (event, claim, text)


def test_a_reason_can_call_nobody_and_the_sentence_has_an_end() -> None:
    reason = "<!channel> & all " + "x" * 5000
    found = posted(notice.of_outcome(outcome("failed", reason)))
    assert found["text"].startswith(f"{RUN} failed for good: &lt;!channel&gt; &amp; all xxx")
    assert found["text"].endswith("…")
    assert len(found["text"]) < MAX_TEXT + 20
    assert found["reason"] == reason


def test_a_figure_that_is_no_number_is_null() -> None:
    assert posted(notice.of_outcome(outcome("refused", evaluation={"loss": float("nan")})))["figures"] == {"loss": None}


def test_the_signature_is_an_hmac_of_the_bytes_sent() -> None:
    body = notice.of_outcome(outcome("done")).body(store="s3://b", time_s=0.0)
    assert signature(body, "key") == "sha256=" + hmac.digest(b"key", body, hashlib.sha256).hex()
    assert signature(body, "key") != signature(body, "another")
