"""Records of runs that never were, but might have been: for reports and accounts, without hours of training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from orchestrator.record.model import AttemptRecord, Event, RunRecord, Submission
from orchestrator.spec import parse
from orchestrator.starter import STARTER

RUN_ID = "code-lm-34c43bef"
START_S = 1_767_225_600.0  # 2026-01-01, midnight UTC
STEP_TOKENS = 65_536
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e|`*_[x](javascript:alert(3))"


@dataclass(kw_only=True)
class Story:
    """Tells what happens, one event after the other, on a clock of its own."""

    total_steps: int
    step_s: float = 2.0
    workers: int = 4
    now_s: float = START_S
    attempt: int = 1
    group: int = 0
    events: list[Event] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def note(self, kind: str, **fields: Any) -> None:
        self.events.append({"time_s": round(self.now_s, 3), "kind": kind, "attempt": self.attempt, **fields})

    def stage(self, name: str, seconds: float) -> None:
        self.note("stage_started", stage=name)
        self.now_s += seconds
        self.note("stage_done", stage=name, seconds=seconds)

    def train(self, first: int, last: int, *, save_every: int = 200, start_s: float = 40.0) -> None:
        """A group of workers from its start to the end of step ``last``."""
        started_s, self.group, self.now_s = self.now_s + 15.0, self.group + 1, self.now_s + start_s
        self.note(
            "training",
            first_step=first,
            total_steps=self.total_steps,
            world_size=self.workers,
            group=self.group,
            device="NVIDIA A100-SXM4-80GB",
            flops_per_token=1.4e10,
            started_s=started_s,
            load_s=12.0,
        )
        if first == 0:
            self._look(0)
        for step in range(first + 1, last + 1):
            self._step(step)
            if step % (5 * save_every) == 0:
                self._look(step)
            if step % save_every == 0:
                self.note("checkpoint", step=step, seconds=9.5)

    def _step(self, step: int) -> None:
        noise = self.random.gauss(0.0, 1.0)
        waited_s = self.step_s * (0.6 if self.random.random() < 0.01 else 0.02)
        saved_s = 0.8 if step % 200 == 0 else 0.0
        seconds = self.step_s * (1 + 0.03 * abs(noise)) + waited_s + saved_s
        self.now_s += seconds
        self.note(
            "step",
            step=step,
            loss=round(self._loss(step) * (1 + 0.025 * noise), 6),
            learning_rate=3e-4,
            grad_norm=round(0.8 + 0.1 * noise, 4),
            tokens=step * STEP_TOKENS,
            tokens_per_s=round(STEP_TOKENS / (seconds - saved_s), 1),
            step_s=round(seconds - saved_s, 4),
            data_wait_s=round(waited_s, 4),
            save_s=saved_s,
        )

    def _look(self, step: int) -> None:
        self.now_s += 12.0
        loss = round(self._loss(step) * 1.02 + 0.01, 6)
        self.note("look", step=step, eval_loss=loss, best_loss=loss, seconds=12.0, ended_early=False)

    def _loss(self, step: int) -> float:
        return 2.05 + 6.9 * math.exp(-step / 90) + 1.6 * math.exp(-step / (0.35 * self.total_steps))


def run_file(**changes: Any) -> dict[str, Any]:
    """A run file as ``spec.json`` holds it."""
    settings = {
        "name": "code-lm",
        "resources": {"workers": {"min": 2, "max": 4}, "gpu": "A100", "cpus_per_worker": 8},
        "gate": {"max_loss": 2.5, "must_beat_serving": True},
        "release": {"model": "code-lm"},
    }
    return parse({**yaml.safe_load(STARTER), **settings, **changes}).model_dump(mode="json")


def begun() -> RunRecord:
    """An attempt that has claimed its number, and no more."""
    return RunRecord(
        run_id=RUN_ID,
        spec=_spec(),
        submissions=(_submission(),),
        attempts=(_attempt(1, START_S + 4.0),),
        events=({"time_s": START_S + 5.0, "kind": "stage_started", "attempt": 1, "stage": "prepare"},),
        outcome=None,
        read_s=START_S + 35.0,
    )


def waiting() -> RunRecord:
    """Submitted, and not begun."""
    return replace(begun(), attempts=(), events=())


def whole(*, total_steps: int = 6000, step_s: float = 2.0) -> RunRecord:
    """Two restarts: a worker that died, and a cluster that did; then export, evaluation, gate and release."""
    story = Story(total_steps=total_steps, step_s=step_s, now_s=START_S + 95.0)
    died, lost = int(total_steps * 0.33) + 63, int(total_steps * 0.7) + 17
    story.stage("prepare", 210.0)
    story.note("dataset", fingerprint="8a6f0b1c2d3e4f50", counts={})
    story.note("stage_started", stage="train")
    story.train(0, died)
    story.now_s += 61.0
    story.note(
        "hang", ranks=[2], reason="silent", step=died, phase="backward", seconds=61.0, group=1, heard_s=story.now_s
    )
    story.train(died // 200 * 200, lost)
    second_s = story.now_s + 900.0
    story.now_s, story.attempt, story.group, story.workers = second_s, 2, 0, 2
    story.note("stage_started", stage="train")
    story.train(lost // 200 * 200, total_steps, start_s=75.0)
    story.note("training_done", step=total_steps, save_s=3.0)
    trained_s = story.now_s
    story.note("stage_done", stage="train", seconds=round(trained_s - second_s, 2))
    story.stage("export", 38.0)
    story.note("stage_started", stage="evaluate")
    story.now_s += 84.0
    story.note("evaluation", **EVALUATION)
    story.note("samples", samples=SAMPLES)
    story.note("stage_done", stage="evaluate", seconds=84.0)
    story.note("gate", passed=True, reasons=[])
    story.stage("release", 1.5)
    story.note("outcome", state="done", reason="")
    return RunRecord(
        run_id=RUN_ID,
        spec=_spec(),
        submissions=(_submission(),),
        attempts=(
            _attempt(1, START_S + 90.0),
            replace(_attempt(2, second_s - 12.0), ended_s=story.now_s, state="done"),
        ),
        events=tuple(story.events),
        outcome=_outcome("done", ended_s=story.now_s, steps=total_steps),
        read_s=story.now_s + 60.0,
    )


def refused() -> RunRecord:
    reason = "eval loss 2.61 is above gate.max_loss 2.5 by 0.11"
    record = whole()
    outcome = _outcome("refused", ended_s=record.read_s - 60.0, steps=6000, reason=reason)
    outcome["facts"] |= {"version": None, "gate": {"passed": False, "reasons": [reason], "against_version": 3}}
    return replace(record, outcome=outcome)


def failed(*, reason: str = "The loss of step 412 is nan. A lower learning rate may help.") -> RunRecord:
    """Training that no retry can save."""
    story = Story(total_steps=6000, now_s=START_S + 40.0)
    story.stage("prepare", 30.0)
    story.note("stage_started", stage="train")
    story.train(0, 411)
    story.note("outcome", state="failed", reason=reason)
    return RunRecord(
        run_id=RUN_ID,
        spec=_spec(),
        submissions=(),
        attempts=(replace(_attempt(1, START_S + 30.0), ended_s=story.now_s, state="failed", reason=reason),),
        events=tuple(story.events),
        outcome={
            "format": "headway/outcome/1", "run_id": RUN_ID, "state": "failed", "reason": reason, "attempt": 1,
            "facts": {}, "ended_s": story.now_s,
        },
        read_s=story.now_s + 5.0,
    )  # fmt: skip


def hostile() -> RunRecord:
    """Every text that comes from outside tries to be markup."""
    record = whole(total_steps=1200)
    events = list(_hostile_events(record))
    outcome = {**(record.outcome or {}), "state": "failed", "reason": HOSTILE}
    submission = replace(
        _submission(), facts={"by": HOSTILE, "target": HOSTILE, "ci": {"actor": HOSTILE, "url": "javascript:alert(4)"}}
    )
    spec = {**record.spec, "spec": {**record.spec["spec"], "name": HOSTILE}, "headway": HOSTILE, "code_digest": HOSTILE}
    attempts = tuple(replace(each, reason=HOSTILE, host=HOSTILE, job=HOSTILE) for each in record.attempts)
    return replace(
        record, run_id=HOSTILE, spec=spec, submissions=(submission,), attempts=attempts, events=tuple(events),
        outcome=outcome,
    )  # fmt: skip


def _hostile_events(record: RunRecord) -> Iterator[Event]:
    for event in record.events:
        if event["kind"] == "samples":
            yield {**event, "samples": [{"prompt": HOSTILE, "completion": f"{HOSTILE}\x00\ud800", "expected": HOSTILE}]}
        elif event["kind"] == "hang":
            yield {**event, "reason": HOSTILE, "phase": HOSTILE}
        elif event["kind"] == "evaluation":
            yield {**event, HOSTILE: 1.0}
        else:
            yield event


EVALUATION = {
    "loss": 2.3127,
    "perplexity": 10.1015,
    "bits_per_byte": 0.8713,
    "unigram_loss": 6.2451,
    "num_targets": 1_204_224,
}
SAMPLES = [
    {
        "prompt": "    def close(self) -> None:\n        self._closed.set()\n",
        "completion": "        self._thread.join(self._timeout)\n        if self.is_alive():\n            return\n",
        "expected": "        self._thread.join(CLOSE_S)\n        if self.is_alive():\n            log.warning(LATE)\n",
    },
    {
        "prompt": "import os\nimport sys\n\ndef main(argv=None):\n    if argv is None:\n",
        "completion": "        argv = sys.argv[1:]\n    parser = argparse.ArgumentParser()\n    parser.add_argument(",
        "expected": "        argv = sys.argv\n    try:\n        opts, args = getopt.getopt(argv[1:], 'hv')\n",
    },
    {
        "prompt": "class Fraction(numbers.Rational):\n    __slots__ = ('_numerator', '_denominator')\n",
        "completion": "\n    def __new__(cls, numerator=0, denominator=None):\n        self = super().__new__(cls)\n",
        "expected": "\n    # We're immutable, so use __new__ not __init__\n    def __new__(cls, numerator=0,",
    },
    {
        "prompt": "# Copyright 2001 by Vinay",
        "completion": " Sajip. All Rights Reserved.\n#\n# Permission to use, copy",
        "expected": " Sajip. All Rights Reserved.",
    },
]


def _spec() -> dict[str, Any]:
    return {
        "spec": run_file(),
        "run_id": RUN_ID,
        "dataset_fingerprint": "8a6f0b1c2d3e4f50",
        "code_digest": "",
        "base_fingerprint": "",
        "headway": "0.1.0",
    }


def _submission() -> Submission:
    ci = {
        "system": "github",
        "repository": "example/models",
        "commit": "5d41402abc4b2a76b9719d911017c592aa3f2b10",
        "workflow": "retrain",
        "actor": "ada",
        "url": "https://github.com/example/models/actions/runs/81920",
    }
    facts = {"by": "arn:aws:sts::123456789012:assumed-role/ci/retrain", "target": "kubernetes", "ci": ci}
    return Submission(submission_id=f"{RUN_ID}-1", submitted_s=START_S, facts=facts)


def _attempt(number: int, claimed_s: float) -> AttemptRecord:
    job = f"{RUN_ID}-{number}"
    return AttemptRecord(number=number, claimed_s=claimed_s, ended_s=None, state="", reason="", job=job, host="head")


def _outcome(state: str, *, ended_s: float, steps: int, reason: str = "") -> dict[str, Any]:
    return {
        "format": "headway/outcome/1",
        "run_id": RUN_ID,
        "state": state,
        "reason": reason,
        "attempt": 2,
        "facts": {
            "steps": steps,
            "tokens": steps * STEP_TOKENS,
            "final_loss": 2.2418,
            "evaluation": EVALUATION,
            "gate": {"passed": state == "done", "reasons": [], "against_version": 3},
            "checkpoint": f"s3://models/headway/runs/{RUN_ID}/checkpoints/step-{steps:08d}/00002-00001-1f9a2b3c",
            "dataset": "code-lm@8a6f0b1c2d3e4f50",
            "export": "s3://models/headway/models/code-lm/versions/00004/",
            "version": "code-lm@4",
        },
        "ended_s": ended_s,
    }


STORIES: dict[str, Callable[[], RunRecord]] = {
    "waiting": waiting,
    "begun": begun,
    "failed": failed,
    "refused": refused,
    "whole": whole,
    "hostile": hostile,
}
"""What became of a run, by name."""
