"""A base's fingerprint is of what it is made of."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from orchestrator.errors import SpecError, StoreError
from orchestrator.pretrained.source import BaseSource, list_base
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import NOT_NEEDED, save_directory, values

HUB = f"hf://org/name@{'0' * 40}"


def put(store: MemoryStore, directory: Path, prefix: str) -> str:
    """A directory's files under ``prefix`` in another bucket."""
    for path in directory.iterdir():
        store.at("models").upload(f"{prefix}/{path.name}", path.read_bytes())
    return f"s3://models/{prefix}"


def names(source: BaseSource) -> set[str]:
    return {file.path for file in source.files}


def test_a_directory_lists_the_files_needed(tmp_path: Path, memory_store: MemoryStore) -> None:
    source = list_base(str(save_directory(tmp_path / "m")), memory_store)
    assert names(source) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors",
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{16}", source.fingerprint)
    assert re.fullmatch(r"[0-9a-f]{16}", source.tokenizer_fingerprint)
    assert source.fingerprint != source.tokenizer_fingerprint


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_copy_elsewhere_is_the_same_base(tmp_path: Path, memory_store: MemoryStore, num_files: int) -> None:
    first = save_directory(tmp_path / "a", num_files=num_files)
    second = save_directory(tmp_path / "b", num_files=num_files)
    for name in NOT_NEEDED:
        (second / name).unlink()
    assert list_base(str(first), memory_store).fingerprint == list_base(str(second), memory_store).fingerprint
    in_s3 = [list_base(put(memory_store, path, path.name), memory_store) for path in (first, second)]
    assert in_s3[0].fingerprint == in_s3[1].fingerprint
    assert in_s3[0].tokenizer_fingerprint == in_s3[1].tokenizer_fingerprint


def test_relative_paths_are_made_absolute(
    tmp_path: Path, memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_directory(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert list_base("m", memory_store).uri == str(tmp_path / "m")


def test_other_weights_make_another_base_with_the_same_tokenizer(tmp_path: Path, memory_store: MemoryStore) -> None:
    path = save_directory(tmp_path / "m")
    before = list_base(str(path), memory_store)
    save_directory(path, values(seed=1))
    after = list_base(str(path), memory_store)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_changes_both(tmp_path: Path, memory_store: MemoryStore, name: str) -> None:
    path = save_directory(tmp_path / "m")
    before = list_base(str(path), memory_store)
    (path / name).write_bytes(b'{"other": 1}')
    after = list_base(str(path), memory_store)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer_fingerprint != before.tokenizer_fingerprint


def test_a_file_rewritten_with_other_bytes_of_the_same_size_is_seen(tmp_path: Path, memory_store: MemoryStore) -> None:
    path = save_directory(tmp_path / "m")
    before = list_base(str(path), memory_store)
    config = path / "config.json"
    modified_ns = config.stat().st_mtime_ns
    config.write_bytes(config.read_bytes().replace(b"8", b"9"))
    os.utime(config, ns=(modified_ns + 1, modified_ns + 1))
    assert list_base(str(path), memory_store).fingerprint != before.fingerprint


def test_trusted_code_counts(tmp_path: Path, memory_store: MemoryStore) -> None:
    path = save_directory(tmp_path / "m")
    plain, trusted = (list_base(str(path), memory_store, trust_remote_code=trust) for trust in (False, True))
    assert names(trusted) - names(plain) == {"modeling_own.py"}
    assert trusted.fingerprint != plain.fingerprint
    assert list_base(HUB, memory_store).fingerprint != list_base(HUB, memory_store, trust_remote_code=True).fingerprint


def test_the_hub_is_not_asked(memory_store: MemoryStore) -> None:
    source = list_base(HUB, memory_store)
    assert (source.uri, source.files, source.is_hub) == (HUB, (), True)
    assert source.tokenizer_fingerprint == source.fingerprint
    assert source.fingerprint != list_base(HUB.replace("name", "other"), memory_store).fingerprint


def test_a_gguf_file_stands_alone(tmp_path: Path, memory_store: MemoryStore) -> None:
    path = tmp_path / "model.Q4.GGUF"
    path.write_bytes(b"GGUF")
    memory_store.at("models").upload("a/model.gguf", b"GGUF")
    memory_store.at("models").upload("a/model.gguf.md5", b"x")
    for uri in (str(path), "s3://models/a/model.gguf"):
        source = list_base(uri, memory_store)
        assert (len(source.files), source.is_gguf) == (1, True)
        assert source.tokenizer_fingerprint == source.fingerprint


def test_folders_in_s3_are_told_apart_by_the_slash(tmp_path: Path, memory_store: MemoryStore) -> None:
    uri = put(memory_store, save_directory(tmp_path / "m"), "m")
    put(memory_store, save_directory(tmp_path / "other", values(seed=1)), "m-other")
    put(memory_store, tmp_path / "m", "m/deeper")
    assert list_base(uri, memory_store).fingerprint == list_base(f"{uri}/", memory_store).fingerprint
    assert all(file.uri == f"{uri}/{file.path}" for file in list_base(uri, memory_store).files)


@pytest.mark.parametrize("uri", ["/nowhere/at/all", "s3://models/nothing", "s3://models/nothing.gguf", "/nowhere.gguf"])
def test_nothing_there_is_one_clear_error(memory_store: MemoryStore, uri: str) -> None:
    with pytest.raises(SpecError, match=f"model.pretrained: there is nothing at {uri}"):
        list_base(uri, memory_store)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, memory_store: MemoryStore) -> None:
    path = save_directory(tmp_path) / "model.safetensors"
    with pytest.raises(SpecError, match="is a file, and no"):
        list_base(str(path), memory_store)


def test_a_store_that_is_down_is_told_as_such(memory_store: MemoryStore) -> None:
    class Down(MemoryStore):
        def at(self, bucket: str, prefix: str = "") -> MemoryStore:
            place = super().at(bucket, prefix)
            place.fail["list"] = StoreError("down")
            return place

    with pytest.raises(StoreError, match="down"):
        list_base("s3://models/m", Down())
