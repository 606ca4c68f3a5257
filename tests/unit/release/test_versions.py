from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from orchestrator.errors import AlreadyExists, EnvironmentUnusable, IntegrityError, NotFound
from orchestrator.release.download import download_files, download_version
from orchestrator.release.versions import (
    CheckpointSource,
    DatasetSource,
    Version,
    VersionFile,
    claim_version,
    list_versions,
    publish,
    read_version,
)
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "tokenizer.json": b"tokens"}


def recorded(data: bytes) -> VersionFile:
    return VersionFile(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def version(number: int = 1, **changes: Any) -> Version:
    facts: dict[str, Any] = {
        "model": "lm",
        "number": number,
        "task": "causal-lm",
        "run_id": "run-1",
        "attempt": 1,
        "checkpoint": CheckpointSource(uri="s3://b/c", step=100),
        "dataset": DatasetSource(name="d", fingerprint="f"),
        "code_digest": "",
        "evaluation": {"loss": 2.0},
        "gate": {"passed": True},
        "files": {name: recorded(data) for name, data in FILES.items()},
        "created_s": 1.0,
        "nonce": "n",
    }
    return Version(**{**facts, **changes})


def released(store: MemoryStore, **changes: Any) -> Version:
    number = claim_version(store, "lm", facts={"run_id": "run-1"})
    for name, data in FILES.items():
        store.upload(layout.version("lm", number) + name, data)
    made = version(number, **changes)
    publish(store, made)
    return made


def test_a_version_exists_once_it_is_published(memory_store: MemoryStore) -> None:
    number = claim_version(memory_store, "lm", facts={"run_id": "run-1"})
    assert number == 1
    assert list_versions(memory_store, "lm") == []
    with pytest.raises(NotFound):
        read_version(memory_store, "lm", 1)
    publish(memory_store, version(1))
    publish(memory_store, version(1))  # a retry
    assert read_version(memory_store, "lm", 1) == version(1)
    with pytest.raises(AlreadyExists):
        publish(memory_store, version(1, nonce="other"))


def test_claimed_numbers_are_never_given_again(memory_store: MemoryStore) -> None:
    claim_version(memory_store, "lm", facts={"run_id": "run-1"})
    second = released(memory_store)
    assert second.number == 2
    assert [found.number for found in list_versions(memory_store, "lm")] == [2]
    assert claim_version(memory_store, "lm", facts={}) == 3
    assert claim_version(memory_store, "other", facts={}) == 1


def test_only_the_run_that_claimed_publishes(memory_store: MemoryStore) -> None:
    with pytest.raises(IntegrityError, match="does not exist"):
        publish(memory_store, version(1))
    claim_version(memory_store, "lm", facts={"run_id": "run-2"})
    with pytest.raises(IntegrityError, match="run-2 claimed it"):
        publish(memory_store, version(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "headway/version/9"}, "format"),
        ({"files": {}}, "files"),
        ({"files": {"../../etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}}, "not a plain file name"),
        ({"files": {"version.json": {"size_bytes": 1, "sha256": "0" * 64}}}, "not a plain file name"),
        ({"files": {"a": {"size_bytes": -1, "sha256": "0" * 64}}}, "size_bytes"),
        ({"files": {"a": {"size_bytes": 1, "sha256": "zz"}}}, "sha256"),
        ({"model": "other"}, "says that it is other@1"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_document_that_lies_is_refused(memory_store: MemoryStore, change: dict[str, Any], message: str) -> None:
    document = {**version(1).model_dump(mode="json"), **change}
    memory_store.upload(layout.version_manifest("lm", 1), json.dumps(document).encode())
    with pytest.raises(IntegrityError, match=message) as caught:
        read_version(memory_store, "lm", 1)
    assert "models/lm/versions/00001/version.json" in caught.value.message


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"\xff", b"[" * 200_000, b'{"format": "headway/version/1"}'])
def test_what_is_not_a_version_is_refused(memory_store: MemoryStore, data: bytes) -> None:
    memory_store.upload(layout.version_manifest("lm", 1), data)
    with pytest.raises(IntegrityError, match=r"version\.json"):
        read_version(memory_store, "lm", 1)


def test_download_gives_the_whole_directory_and_caches_it(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = released(memory_store)
    directory = download_version(memory_store, made, tmp_path)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == FILES
    memory_store.fail["download"] = EnvironmentUnusable("down")
    assert download_version(memory_store, made, tmp_path) == directory


def test_a_damaged_cache_is_fetched_again(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = released(memory_store)
    directory = download_version(memory_store, made, tmp_path)
    (directory / "model.safetensors").write_bytes(b"short")
    (directory / "config.json").unlink()
    download_version(memory_store, made, tmp_path)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == FILES


def test_a_flipped_byte_leaves_no_directory(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = released(memory_store)
    memory_store.tamper(layout.version("lm", 1) + "model.safetensors", b"weighty" * 1000)
    with pytest.raises(IntegrityError, match=r"model\.safetensors does not match"):
        download_version(memory_store, made, tmp_path)
    memory_store.delete([layout.version("lm", 1) + "model.safetensors"])
    with pytest.raises(NotFound):
        download_version(memory_store, made, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_of_many_that_want_a_version_at_once_one_downloads_it(tmp_path: Path) -> None:
    all_at_once, downloads = Barrier(4), []

    class Counting(MemoryStore):
        def download(self, key: str, path: Path, *, sha256: str) -> None:
            downloads.append(key)
            super().download(key, path, sha256=sha256)

    store = Counting()
    made = released(store)

    def want() -> Path:
        all_at_once.wait()
        return download_version(store, made, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        assert {each.result() for each in [pool.submit(want) for _ in range(4)]} == {tmp_path / made.digest}
    assert len(downloads) == len(FILES)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", ".", "", ".hidden", "a\\b", "a\0", "x" * 300])
def test_no_file_is_written_outside(memory_store: MemoryStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match="not a plain file name"):
        download_files(memory_store, "p/", {name: recorded(b"")}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = released(memory_store)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentUnusable, match="cannot be written") as caught:
        download_version(memory_store, made, tmp_path / "file")
    assert "HEADWAY_CACHE" in caught.value.next_step


def test_two_processes_may_fetch_at_once(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = released(memory_store)
    directory = tmp_path / "out"
    prefix = layout.version("lm", 1)
    download_files(memory_store, prefix, made.files, directory)
    download_files(memory_store, prefix, made.files, directory)  # finds the other's, complete
    (directory / "config.json").write_bytes(b"other")
    with pytest.raises(EnvironmentUnusable):
        download_files(memory_store, prefix, made.files, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
