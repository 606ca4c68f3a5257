"""The submitted code gets into a pod as it was sent, and two versions of Headway refuse each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import __version__
from orchestrator.errors import IntegrityError, StoreError, UsageError
from orchestrator.package import Package, package
from orchestrator.pod.fetch_code import fetch_code, require_version
from orchestrator.store import layout
from orchestrator.store.code import read_code, upload_code
from tests.unit.fakes import MemoryStore


@pytest.fixture
def packed(tmp_path: Path) -> Package:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "task.py").write_text("x = 1\n")
    return package(tmp_path / "work")


def fetch(store: MemoryStore, digest: str, to: Path, version: str = __version__) -> None:
    fetch_code(store, digest=digest, to=to, version=version)


def test_what_was_uploaded_is_fetched_and_again_is_the_same(
    memory_store: MemoryStore, packed: Package, tmp_path: Path
) -> None:
    upload_code(memory_store, digest=packed.digest, data=packed.data)
    assert list(memory_store.objects) == [f"code/{packed.digest}.zip"]
    for _ in range(2):
        fetch(memory_store, packed.digest, tmp_path / "code")
        assert (tmp_path / "code" / "task.py").read_text() == "x = 1\n"


def test_a_zip_of_the_same_digest_stays_whatever_its_bytes_are(memory_store: MemoryStore, packed: Package) -> None:
    memory_store.create(layout.code(packed.digest), b"made by another zlib")
    upload_code(memory_store, digest=packed.digest, data=packed.data)
    assert memory_store.get(layout.code(packed.digest)) == b"made by another zlib"


def test_another_version_is_refused_before_anything_is_read(
    memory_store: MemoryStore, packed: Package, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        fetch(memory_store, packed.digest, tmp_path / "code", version="9.9.9")
    assert type(caught.value) is UsageError
    assert f"Headway {__version__}" in caught.value.message
    assert "9.9.9" in caught.value.message
    assert "image of 9.9.9" in caught.value.next_step
    assert f"headway=={__version__}" in caught.value.next_step
    assert not (tmp_path / "code").exists()


def test_the_own_version_is_taken() -> None:
    require_version(__version__)
    require_version("1.2.3", own="1.2.3")


def test_code_that_was_never_uploaded(memory_store: MemoryStore, packed: Package, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no such code package.*uploads it"):
        fetch(memory_store, packed.digest, tmp_path / "code")


def test_damage_names_the_object_to_delete(memory_store: MemoryStore, packed: Package, tmp_path: Path) -> None:
    memory_store.create(layout.code(packed.digest), packed.data[:-30])
    with pytest.raises(IntegrityError) as caught:
        fetch(memory_store, packed.digest, tmp_path / "code")
    assert memory_store.uri_of(layout.code(packed.digest)) in caught.value.next_step


@pytest.mark.parametrize("digest", ["", "../runs/x", "A" * 64, "0" * 63])
def test_what_is_no_digest_is_no_key(memory_store: MemoryStore, tmp_path: Path, digest: str) -> None:
    with pytest.raises(UsageError, match="64 hex digits"):
        fetch(memory_store, digest, tmp_path / "code")


def test_a_zip_above_the_limit_is_not_read(memory_store: MemoryStore, packed: Package) -> None:
    upload_code(memory_store, digest=packed.digest, data=packed.data)
    memory_store.fail["get"] = StoreError("it was read")
    with pytest.raises(IntegrityError, match=f"the limit is {len(packed.data) - 1}"):
        read_code(memory_store, packed.digest, max_bytes=len(packed.data) - 1)
