"""The pipeline's decisions that need no cluster: whom the gate compares with, and whose error it was."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from orchestrator.errors import AlreadyExists, AttemptFailed, HeadwayError, StoreError
from orchestrator.release import channels
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.spec import ReleaseSpec
from tests.tiny_model import make_version
from tests.unit.fakes import MemoryStore
from workloads.cluster import own_errors
from workloads.pipeline import _serving

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


def test_a_retry_after_the_release_does_not_compete_with_itself(memory_store: MemoryStore) -> None:
    assert _serving(memory_store, RELEASE, DATASET, but_for="mine") is None
    first = released(memory_store, "other")
    released(memory_store, "mine")
    found = _serving(memory_store, RELEASE, DATASET, but_for="mine")
    assert found is not None
    assert (found.version, found.same_split) == (first, True)


def test_an_entry_follows_what_was_seen_or_is_not_made(memory_store: MemoryStore) -> None:
    number = released(memory_store, "other")
    with pytest.raises(AlreadyExists):
        channels.append(memory_store, "lm", "production", version=number, by="late", reason="", after=0)
    entry = channels.append(memory_store, "lm", "production", version=number, by="seen", reason="", after=1)
    assert entry.number == 2
    assert [e.by for e in channels.history(memory_store, "lm", "production")] == ["test", "seen"]


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
