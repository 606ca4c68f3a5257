"""What ``headway verify`` reads, and by which name it tells each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from orchestrator.checkpoint.catalog import committed
from orchestrator.commands.verify import _checks
from orchestrator.errors import IntegrityError
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.store import claim_group, layout
from tests.tiny_model import make_version
from tests.unit.checkpoint.adapters import base_values, make_base
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


def test_a_version_that_is_an_adapter_is_verified_with_its_base(memory_store: MemoryStore, tmp_path: Path) -> None:
    base = make_base(memory_store, tmp_path / "base", base_values())
    number = claim_version(memory_store, "chat", facts={"run_id": "tiny-00000000"})
    memory_store.upload(layout.version("chat", number) + "adapter_model.safetensors", b"adapter")
    file = VersionFile(size_bytes=7, sha256=hashlib.sha256(b"adapter").hexdigest())
    version = make_version(model="chat", number=number, files={"adapter_model.safetensors": file})
    publish(memory_store, version.model_copy(update={"base": base.reference}))
    checks = dict(_checks(memory_store, "chat@1"))
    weights = f"base {base.fingerprint}/model.safetensors"
    assert set(checks) == {"chat@1/adapter_model.safetensors", f"base {base.fingerprint}/config.json", weights}
    assert checks[weights]() == base.weights["model.safetensors"].size_bytes
    memory_store.tamper(base.prefix + "model.safetensors", b"other")
    with pytest.raises(IntegrityError, match="does not match its recorded digest"):
        checks[weights]()


def test_what_is_deleted_before_it_is_read_is_not_verified(memory_store: MemoryStore) -> None:
    save(memory_store, new_group(memory_store), 4)
    ((_, check),) = _checks(memory_store, RUN)
    assert check()
    memory_store.delete(key for key in memory_store.objects if "/checkpoints/" in key)
    assert check() is None
