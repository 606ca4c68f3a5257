"""A node's copy of the small files is whole, or is made again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentUnusable, IntegrityError, StoreError
from orchestrator.pretrained.assets import fetch_assets
from orchestrator.pretrained.format import BaseManifest
from orchestrator.pretrained.source import list_base
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import SMALL, save_directory
from workloads.fetch_base import fetch_base


@pytest.fixture
def base(memory_store: MemoryStore, tmp_path: Path) -> BaseManifest:
    return fetch_base(list_base(str(save_directory(tmp_path / "m")), memory_store), memory_store)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_all_small_files_and_no_weights(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    directory = fetch_assets(memory_store, base, tmp_path / "cache" / "deep")
    assert contents(directory) == SMALL
    assert list((tmp_path / "cache" / "deep").iterdir()) == [directory]


def test_what_is_there_is_not_fetched_again(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    directory = fetch_assets(memory_store, base, tmp_path / "cache")
    memory_store.fail["get"] = StoreError("down")
    assert fetch_assets(memory_store, base, tmp_path / "cache") == directory


@pytest.mark.parametrize("harm", ["changed", "gone", "longer"])
def test_what_is_not_as_it_was_is_made_again(
    memory_store: MemoryStore, base: BaseManifest, tmp_path: Path, harm: str
) -> None:
    path = fetch_assets(memory_store, base, tmp_path / "cache") / "tokenizer.json"
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"m", b"n") + (b" " if harm == "longer" else b""))
    assert contents(fetch_assets(memory_store, base, tmp_path / "cache")) == SMALL


def test_several_processes_may_ask_at_once(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: fetch_assets(memory_store, base, tmp_path / "cache"), range(32)))
    assert len(found) == 1
    assert contents(found.pop()) == SMALL
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damage_in_the_store_leaves_nothing_on_the_node(
    memory_store: MemoryStore, base: BaseManifest, tmp_path: Path
) -> None:
    memory_store.tamper(f"{base.prefix}tokenizer.json", b"other")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        fetch_assets(memory_store, base, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentUnusable, match="cannot be written"):
        fetch_assets(memory_store, base, tmp_path / "file")
