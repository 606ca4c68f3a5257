"""The pipeline where it needs no cluster: what is tried again, whom the gate compares with, whose error it was."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from orchestrator.errors import (
    AlreadyExists,
    AttemptFailed,
    Fenced,
    HeadwayError,
    IntegrityError,
    Interrupted,
    NotFound,
    StoreError,
)
from orchestrator.record import EventLog
from orchestrator.release import channels
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.spec import ReleaseSpec
from orchestrator.store import Attempt, claim_attempt
from orchestrator.store.attempts import request_stop, stop_reason
from tests.tiny_model import make_version
from tests.unit.fakes import MemoryStore
from workloads.cluster import own_errors
from workloads.export import Export
from workloads.notices import Notices
from workloads.pipeline import Pipeline
from workloads.ray_tasks import look
from workloads.signals import _ask_to_stop

RELEASE = ReleaseSpec(model="lm")
DATASET: Any = SimpleNamespace(fingerprint="0123456789abcdef")


def released(store: MemoryStore, run_id: str) -> int:
    """Publish a version of ``run_id`` and append it to the channel."""
    number = claim_version(store, "lm", facts={})
    digest = hashlib.sha256(b"").hexdigest()
    files = {"config.json": VersionFile(size_bytes=0, sha256=digest)}
    publish(store, make_version(model="lm", number=number, files=files))
    channels.append(store, "lm", "production", version=number, by="test", reason="", run_id=run_id)
    return number


def test_an_entry_follows_what_was_seen_or_is_not_made(memory_store: MemoryStore) -> None:
    number = released(memory_store, "other")
    with pytest.raises(AlreadyExists):
        channels.append(memory_store, "lm", "production", version=number, by="late", reason="", after=0)
    entry = channels.append(memory_store, "lm", "production", version=number, by="seen", reason="", after=1)
    assert entry.number == 2
    assert [e.by for e in channels.history(memory_store, "lm", "production").entries] == ["test", "seen"]


def test_a_tasks_own_error_comes_out_of_rays() -> None:
    cause = StoreError("down", next_step="up")
    wrapped = ray.exceptions.RayTaskError("share", "Traceback …\nStoreError: down", cause).as_instanceof_cause()
    with pytest.raises(StoreError) as caught, own_errors():
        raise wrapped
    assert (caught.value.message, caught.value.next_step) == ("down", "up")
    assert not isinstance(caught.value, ray.exceptions.RayError)


def test_any_other_error_of_a_task_is_quoted() -> None:
    wrapped = ray.exceptions.RayTaskError("share", "Traceback …\nValueError: odd", ValueError("odd"))
    with pytest.raises(AttemptFailed, match="A task on the cluster failed: ") as caught, own_errors():
        raise wrapped
    assert "odd" in str(caught.value)
    assert isinstance(caught.value, HeadwayError)


def test_errors_that_are_not_rays_pass_through() -> None:
    with pytest.raises(StoreError, match="down"), own_errors():
        raise StoreError("down")


# -- a last checkpoint that is damaged


EXPORTED = Export(prefix="export/", version=None, step=8, checkpoint="", tokens=64, loss=3.0, dtype="fp32", files={})


@dataclass
class Scripted(Pipeline):
    """A pipeline whose stages do as they are told, and tell what was done."""

    exports: list[Export | HeadwayError] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def _train(self, dataset: Any, steps: int, *, again: bool) -> None:
        self.done.append("train again" if again else "train")

    def _export(self, dataset: Any, steps: int) -> Export:
        self.done.append("export")
        found = self.exports.pop(0)
        if isinstance(found, HeadwayError):
            raise found
        return found


@pytest.fixture
def attempt(memory_store: MemoryStore) -> Attempt:
    return claim_attempt(memory_store, "run-1", facts={})


@pytest.fixture
def pipeline(memory_store: MemoryStore, attempt: Attempt) -> Iterator[Scripted]:
    identity: Any = SimpleNamespace(run_id=attempt.run_id)
    spec: Any = None
    events = EventLog(memory_store, attempt, "pipeline")
    notices = Notices(settings=None, store=memory_store, run_id=attempt.run_id)
    yield Scripted(spec, memory_store, identity, attempt, events, lambda _: None, notices)
    events.close()


@pytest.mark.parametrize("fault", [IntegrityError("block 0 is damaged"), NotFound("no such object")])
def test_a_last_checkpoint_that_is_damaged_is_trained_again(pipeline: Scripted, fault: HeadwayError) -> None:
    pipeline.exports = [fault, EXPORTED]
    assert pipeline._train_and_export(DATASET, 8) == EXPORTED
    assert pipeline.done == ["train", "export", "train again", "export"]


def test_it_is_trained_again_once(pipeline: Scripted) -> None:
    pipeline.exports = [IntegrityError("first"), IntegrityError("second")]
    with pytest.raises(IntegrityError, match="second"):
        pipeline._train_and_export(DATASET, 8)
    assert pipeline.done == ["train", "export", "train again", "export"]


def test_no_other_error_is_a_reason_to_train_again(pipeline: Scripted) -> None:
    pipeline.exports = [StoreError("down")]
    with pytest.raises(StoreError, match="down"):
        pipeline._train_and_export(DATASET, 8)
    assert pipeline.done == ["train", "export"]


def test_a_run_that_training_failed_for_good_is_not_exported(memory_store: MemoryStore, pipeline: Scripted) -> None:
    failed = commit_outcome(memory_store, Outcome.failed("run-1", attempt=1, reason="not finite"))
    assert pipeline._train_and_export(DATASET, 8) == failed
    assert pipeline.done == ["train"]


# -- stopping


def test_a_stop_before_a_stage_says_how_to_go_on(memory_store: MemoryStore, pipeline: Scripted) -> None:
    request_stop(memory_store, "run-1", 1, reason="headway stop")
    with pytest.raises(Interrupted, match="stopped before train: headway stop") as caught:
        pipeline._train_and_export(DATASET, 8)
    assert caught.value.next_step == "Submit the same run file to go on from there."
    assert pipeline.done == []


def test_a_stop_while_a_stage_waits_for_tasks_is_seen(memory_store: MemoryStore, pipeline: Scripted) -> None:
    with pipeline._stage("prepare"):
        look()
        request_stop(memory_store, "run-1", 1, reason="headway stop")
        with pytest.raises(Interrupted, match="stopped in prepare: headway stop"):
            look()
    look()  # outside of the stage nobody is asked


def test_so_is_an_attempt_that_took_over(memory_store: MemoryStore, pipeline: Scripted) -> None:
    with pipeline._stage("prepare"):
        claim_attempt(memory_store, "run-1", facts={})
        with pytest.raises(Fenced):
            look()


def test_a_store_that_cannot_be_asked_whether_to_stop_is_asked_again(
    memory_store: MemoryStore, pipeline: Scripted
) -> None:
    with pipeline._stage("prepare"):
        memory_store.fail["list"] = StoreError("down")
        look()
        del memory_store.fail["list"]
        request_stop(memory_store, "run-1", 1, reason="headway stop")
        with pytest.raises(Interrupted):
            look()


def test_a_stop_that_cannot_be_asked_for_is_a_warning(
    memory_store: MemoryStore, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    memory_store.fail["create"] = StoreError("down")
    with caplog.at_level(logging.WARNING):
        _ask_to_stop(memory_store, attempt, "SIGTERM")
    assert "the stop could not be asked for: down" in caplog.text
    del memory_store.fail["create"]
    _ask_to_stop(memory_store, attempt, "SIGTERM")
    assert stop_reason(memory_store, attempt) == "SIGTERM"
