"""Where an export goes in S3: one export at a time, and none takes away what it did not write."""

from __future__ import annotations

import json

import pytest

from orchestrator.commands.export import CLAIM, DONE, _Prefix
from orchestrator.errors import StoreError, UsageError
from tests.unit.fakes import MemoryStore


def test_a_finished_export_is_its_files_alone(memory_store: MemoryStore) -> None:
    place = _Prefix(memory_store)
    place.put("config.json", b"{}")
    assert CLAIM in memory_store.objects
    place.finish({"step": 4})
    assert memory_store.objects.keys() == {"config.json", DONE}
    assert json.loads(memory_store.objects[DONE]) == {"step": 4}


def test_a_second_export_to_a_prefix_is_refused_and_harms_nothing(memory_store: MemoryStore) -> None:
    place = _Prefix(memory_store)
    place.put("config.json", b"{}")
    before = memory_store.objects
    with pytest.raises(UsageError, match="Another export is, or was, being written") as caught:
        _Prefix(memory_store)
    assert CLAIM in caught.value.next_step
    assert memory_store.objects == before


def test_a_prefix_that_is_not_empty_stays_as_it_was(memory_store: MemoryStore) -> None:
    memory_store.upload("notes.txt", b"mine")
    with pytest.raises(UsageError, match="is not empty"):
        _Prefix(memory_store)
    assert memory_store.objects == {"notes.txt": b"mine"}


def test_a_prefix_that_cannot_be_looked_at_is_not_left_claimed(memory_store: MemoryStore) -> None:
    memory_store.fail["list"] = StoreError("down")
    with pytest.raises(StoreError, match="down"):
        _Prefix(memory_store)
    assert memory_store.objects == {}


def test_a_failed_export_takes_away_what_it_wrote_and_no_more(memory_store: MemoryStore) -> None:
    place = _Prefix(memory_store)
    place.put("config.json", b"{}")
    memory_store.upload("notes.txt", b"mine")
    place.discard()
    assert memory_store.objects == {"notes.txt": b"mine"}


def test_what_cannot_be_deleted_hides_no_error_and_keeps_its_claim(memory_store: MemoryStore) -> None:
    place = _Prefix(memory_store)
    place.put("config.json", b"{}")
    memory_store.fail["delete"] = StoreError("down")
    place.discard()
    assert memory_store.objects.keys() == {"config.json", CLAIM}


def test_a_claim_that_stays_does_not_undo_a_finished_export(memory_store: MemoryStore) -> None:
    place = _Prefix(memory_store)
    place.put("config.json", b"{}")
    memory_store.fail["delete"] = StoreError("down")
    place.finish({})
    del memory_store.fail["delete"]
    place.discard()
    assert memory_store.objects.keys() == {"config.json", DONE}
