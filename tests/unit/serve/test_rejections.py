"""Whom the server tells that it rejected a version, and when."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from orchestrator.errors import StoreError
from orchestrator.release import channels
from orchestrator.release.canary_policy import CanaryPolicy
from orchestrator.release.channels import ChannelStatus
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.store import layout
from tests.tiny_model import make_version
from tests.unit.fakes import MemoryStore
from workloads.serve.decider import Decider
from workloads.serve.rejections import tell_rejected
from workloads.serve.reports import ReplicaReport


@pytest.fixture
def told() -> list[tuple[int, str]]:
    return []


def decider(store: MemoryStore, told: list[tuple[int, str]]) -> Decider:
    return Decider(
        store=store,
        model="lm",
        channel="production",
        policy=CanaryPolicy(),
        expire_s=20.0,
        tell=lambda number, reason: told.append((number, reason)),
    )


def test_a_rejection_is_told_once_it_is_written(memory_store: MemoryStore, told: list[tuple[int, str]]) -> None:
    decides = decider(memory_store, told)
    decides.report(ReplicaReport(replica="a", serving=1))
    memory_store.fail["put_status"] = StoreError("down")
    decides.report(ReplicaReport(replica="a", serving=1, failures={2: "odd weights"}))
    assert told == []
    del memory_store.fail["put_status"]
    for _ in range(3):
        decides.report(ReplicaReport(replica="a", serving=1, failures={2: "odd weights"}))
    assert told == [(2, "odd weights")]


def test_after_a_restart_it_is_told_again_for_the_claim_to_decide(
    memory_store: MemoryStore, told: list[tuple[int, str]]
) -> None:
    before = ChannelStatus(serving=1, rejected={2: "NaN", 3: "slow"}, updated_s=1.0)
    channels.write_status(memory_store, "lm", "production", before)
    decider(memory_store, told).report(ReplicaReport(replica="a", serving=1))
    assert told == [(2, "NaN"), (3, "slow")]


def put_version(store: MemoryStore, spec: dict[str, Any] | None) -> str:
    number = claim_version(store, "lm", facts={})
    files = {"config.json": VersionFile(size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())}
    version = make_version(model="lm", number=number, files=files)
    publish(store, version)
    if spec is not None:
        store.create_json(layout.run_spec(version.run_id), {"spec": spec})
    return version.run_id


def tell(store: MemoryStore) -> Any:
    return tell_rejected(store, "lm", "production", 1, "odd weights", environ={})


def test_the_runs_own_webhook_is_told(memory_store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    put_version(memory_store, {"notify": {"webhook_env": "HOOK"}})
    delivery = tell(memory_store)
    assert (delivery.event, delivery.delivered) == ("rejected", False)
    assert "the variable HOOK is not set where the notice is sent from" in delivery.error
    assert "lm@1 was rejected on channel production, and gets no requests: odd weights" in caplog.text


@pytest.mark.parametrize("spec", [None, {}, {"notify": None}, {"notify": {"webhook_env": "HOOK", "events": ["done"]}}])
def test_where_nobody_wants_to_know_nobody_is_told(memory_store: MemoryStore, spec: dict[str, Any] | None) -> None:
    put_version(memory_store, spec)
    assert tell(memory_store) is None


@pytest.mark.parametrize("fault", ["version", "spec", "store"])
def test_what_cannot_be_read_is_logged(memory_store: MemoryStore, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    if fault == "spec":
        put_version(memory_store, {"notify": {"hook": "of another Headway"}})
    if fault == "store":
        memory_store.fail["get"] = StoreError("down")
    assert tell(memory_store) is None
    assert "Whom to tell that lm@1 is rejected is not known" in caplog.text
