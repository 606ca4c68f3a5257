"""What ``headway verify`` reads, and by which name it tells each."""

from __future__ import annotations

from orchestrator.checkpoint.catalog import committed
from orchestrator.commands.verify import _checks
from orchestrator.store import claim_group
from tests.unit.checkpoint.saving import RUN, new_group, save
from tests.unit.fakes import MemoryStore


def test_two_folders_of_one_step_are_told_apart(memory_store: MemoryStore) -> None:
    group = new_group(memory_store)
    save(memory_store, group, 4)
    save(memory_store, group, 8)
    kept = memory_store.objects
    save(memory_store, claim_group(memory_store, group.attempt), 8)
    for key, data in kept.items():
        memory_store.tamper(key, data)
    newer, older, _ = committed(memory_store, RUN)
    names = [name for name, _ in _checks(memory_store, RUN)]
    assert names == [f"{RUN}@8/{newer.name}", f"{RUN}@8/{older.name}", f"{RUN}@4"]


def test_what_is_deleted_before_it_is_read_is_not_verified(memory_store: MemoryStore) -> None:
    save(memory_store, new_group(memory_store), 4)
    ((_, check),) = _checks(memory_store, RUN)
    assert check()
    memory_store.delete(key for key in memory_store.objects if "/checkpoints/" in key)
    assert check() is None
