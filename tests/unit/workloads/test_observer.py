"""What rank 0 makes of a preemption notice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.checkpoint.save import SaveCounts
from orchestrator.errors import StoreError
from orchestrator.record import EventReader
from orchestrator.store import claim_attempt, claim_group
from tests.unit.fakes import MemoryStore
from workloads.observer import observed


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_each_node_to_be_taken_away_is_one_notice(store: MemoryStore) -> None:
    told: list[frozenset[str]] = [frozenset()]
    group = claim_group(store, claim_attempt(store, "run-1", facts={}))
    with observed(store, group, rank=0, preempted=lambda: told[-1]) as observer:
        counts = []
        for nodes in ((), ("a",), ("a",), ("a", "b"), ("b",)):
            told.append(frozenset(nodes))
            observer.look_for_preemption()
            counts.append(observer.num_notices)
    assert counts == [0, 1, 1, 2, 2]
    events = [event for event in EventReader(store, "run-1").poll() if event["kind"] == "preemption"]
    assert [event["nodes"] for event in events] == [["a"], ["a", "b"]]


def test_what_was_noted_is_in_the_store_once_flushed(store: MemoryStore) -> None:
    group = claim_group(store, claim_attempt(store, "run-1", facts={}))
    with observed(store, group, rank=0) as observer:
        observer.note("step", step=1)
        observer.flush()
        assert [event["step"] for event in EventReader(store, "run-1").poll()] == [1]


def test_a_store_that_does_not_answer_keeps_no_checkpoint_from_its_commit(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = claim_group(store, claim_attempt(store, "run-1", facts={}))

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("no answer")

    with observed(store, group, rank=0) as observer:
        observer.note("step", step=1)
        with monkeypatch.context() as broken:
            broken.setattr(store, "create", refuse)
            observer.flush()
        assert "not written yet: no answer" in caplog.text
        observer.flush()
        assert [event["step"] for event in EventReader(store, "run-1").poll()] == [1]


def test_listeners_hear_all_ranks_and_only_rank_0_records(store: MemoryStore) -> None:
    group, heard = claim_group(store, claim_attempt(store, "run-1", facts={})), []
    for rank in (0, 1):
        with observed(store, group, rank=rank, on_event=lambda kind, fields: heard.append((kind, fields))) as observer:
            observer.note("step", step=rank)
    assert heard == [("step", {"step": 0}), ("step", {"step": 1})]
    assert [event["step"] for event in EventReader(store, "run-1").poll()] == [0]


def test_what_saves_held_up_is_told_once(store: MemoryStore) -> None:
    group = claim_group(store, claim_attempt(store, "run-1", facts={}))
    writer: Any = SimpleNamespace(counts=SaveCounts(blocked_s=1.5))
    with observed(store, group, rank=0) as observer:
        assert [observer.blocked_s(writer), observer.blocked_s(writer)] == [1.5, 0.0]
        writer.counts.blocked_s += 0.25
        assert observer.blocked_s(writer) == 0.25


def test_small_figures_keep_their_digits(store: MemoryStore) -> None:
    group = claim_group(store, claim_attempt(store, "run-1", facts={}))
    with observed(store, group, rank=0) as observer:
        observer.step({"step": 1, "learning_rate": 3.1234567e-7, "tokens_per_s": 123456.789})
    (event,) = EventReader(store, "run-1").poll()
    assert (event["step"], event["learning_rate"], event["tokens_per_s"]) == (1, 3.123457e-7, 123456.8)
