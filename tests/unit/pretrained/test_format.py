"""A base's manifest is checked before anything in it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.format import seal
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.pretrained.format import BaseManifest, read_base
from orchestrator.pretrained.source import list_base
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import save_directory
from workloads.fetch_base import fetch_base


@pytest.fixture
def base(memory_store: MemoryStore, tmp_path: Path) -> BaseManifest:
    return fetch_base(list_base(str(save_directory(tmp_path / "m")), memory_store), memory_store)


def with_change(base: BaseManifest, **changed: Any) -> bytes:
    return seal({**base.model_dump(mode="json"), **changed})


def test_what_was_written_is_read(memory_store: MemoryStore, base: BaseManifest) -> None:
    assert read_base(memory_store, base.fingerprint) == base
    assert base.size_bytes == sum(f.size_bytes for f in [*base.files.values(), *base.weights.values()])


def test_a_base_that_was_never_fetched_is_not_found(memory_store: MemoryStore) -> None:
    with pytest.raises(NotFound):
        read_base(memory_store, "0" * 16)
    with pytest.raises(IntegrityError, match="is not the fingerprint of a base model"):
        read_base(memory_store, "../../x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "headway/base/2"}, "format"),
        ({"prefix": "bases/other/x/"}, "is no folder of this base"),
        ({"prefix": "bases/FINGERPRINT/x"}, "is no folder of this base"),
        ({"prefix": "bases/FINGERPRINT/../"}, "is no folder of this base"),
        ({"files": {"../etc/passwd": {"size_bytes": 1, "sha256": ""}}}, "not a plain file name"),
        ({"files": {"a/b": {"size_bytes": 1, "sha256": ""}}}, "not a plain file name"),
        ({"files": {"..": {"size_bytes": 1, "sha256": ""}}}, "not a plain file name"),
        ({"weights": {}}, "there is no file"),
        ({"extra": 1}, "extra"),
        ({"block_bytes": 4096}, "block_bytes"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    memory_store: MemoryStore, base: BaseManifest, changed: dict[str, Any], message: str
) -> None:
    if "prefix" in changed:
        changed = {"prefix": changed["prefix"].replace("FINGERPRINT", base.fingerprint)}
    memory_store.tamper(layout.base_manifest(base.fingerprint), with_change(base, **changed))
    with pytest.raises(IntegrityError, match="is not a headway/base/1 manifest") as caught:
        read_base(memory_store, base.fingerprint)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offset": -1}, "lies outside"),
        ({"offset": 10**9}, "lies outside"),
        ({"shape": [2**40, 2**40]}, "lies outside"),
        ({"shape": [2**63] * 64}, "there is no such shape"),
        ({"shape": [-1]}, "there is no such shape"),
        ({"dtype": "F8"}, "no dtype 'F8'"),
        ({"file": "config.json"}, "there is no file 'config.json'"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(
    memory_store: MemoryStore, base: BaseManifest, changed: dict[str, Any], message: str
) -> None:
    tensors = base.model_dump(mode="json")["tensors"]
    tensors["norm.weight"] |= changed
    memory_store.tamper(layout.base_manifest(base.fingerprint), with_change(base, tensors=tensors))
    with pytest.raises(IntegrityError, match=message):
        read_base(memory_store, base.fingerprint)


def test_a_flipped_bit_and_another_bases_manifest_are_seen(memory_store: MemoryStore, base: BaseManifest) -> None:
    key = layout.base_manifest(base.fingerprint)
    data = memory_store.get(key)
    memory_store.tamper(key, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(IntegrityError, match="is damaged"):
        read_base(memory_store, base.fingerprint)
    other = "0" * 16
    memory_store.tamper(layout.base_manifest(other), data)
    with pytest.raises(IntegrityError, match="is the manifest of another base model"):
        read_base(memory_store, other)


def test_the_digest_is_of_contents_alone(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    elsewhere = MemoryStore(prefix="elsewhere")
    again = fetch_base(list_base(str(save_directory(tmp_path / "copy")), elsewhere), elsewhere)
    assert again.prefix != base.prefix
    assert again.digest == base.digest
    (tmp_path / "copy" / "tokenizer.json").write_bytes(b"{}")
    other = fetch_base(list_base(str(tmp_path / "copy"), elsewhere), elsewhere)
    assert other.digest != base.digest
