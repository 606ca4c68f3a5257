"""``headway list runs`` over stores that are not whole."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.commands.list_runs import list_runs, run_words
from orchestrator.store import claim_attempt, layout
from tests.unit.fakes import MemoryStore

SUMMARY: dict[str, Any] = {"state": "done", "steps": 12, "eval_loss": 2.5, "started_s": 50.0, "version": "lm@1"}


@pytest.fixture
def store(memory_store: MemoryStore) -> MemoryStore:
    """One run that is whole."""
    memory_store.create_json(layout.summary("whole-00000001"), SUMMARY)
    return memory_store


def by_run(store: MemoryStore) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in list_runs(store)}


def test_a_run_that_ended_is_told_by_its_summary(store: MemoryStore) -> None:
    row = by_run(store)["whole-00000001"]
    assert {name: row[name] for name in SUMMARY} == SUMMARY
    assert run_words(row)["version"] == "lm@1"


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"3"])
def test_of_a_damaged_summary_the_rest_is_told(store: MemoryStore, content: bytes) -> None:
    claim_attempt(store, "other-00000001", facts={"job": "a job"})
    store.create(layout.summary("other-00000001"), content)
    rows = by_run(store)
    assert (rows["other-00000001"]["state"], rows["other-00000001"]["attempts"]) == ("in flight", 1)
    assert rows["whole-00000001"]["state"] == "done"


@pytest.mark.parametrize("key", [layout.outcome("bad-00000001"), layout.attempt("bad-00000001", 2)])
def test_a_damaged_run_is_a_row_and_hides_no_other(store: MemoryStore, key: str) -> None:
    store.create(key, b"{")
    rows = by_run(store)
    assert rows["bad-00000001"]["state"] == "damaged"
    assert rows["whole-00000001"]["state"] == "done"
    assert all(run_words(row)["run"] for row in rows.values())
