"""A base is made once, of sound files, whoever else makes it at the same time."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.checkpoint.format import block_index
from orchestrator.errors import IntegrityError, NotFound, RunError, StoreError
from orchestrator.pretrained.format import BaseManifest, read_base
from orchestrator.pretrained.source import BaseSource, list_base
from orchestrator.store import Store, layout
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import SMALL, safetensors_bytes, save_directory, values
from tests.unit.pretrained.test_source import put
from workloads.fetch_base import WeightJob, fetch_base, one_by_one


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_directory(tmp_path / "m")


def source_of(store: Store, directory: Path) -> BaseSource:
    return list_base(str(directory), store)


def folders(store: MemoryStore, source: BaseSource) -> list[str]:
    return list(store.list_folders(layout.base(source.fingerprint)))


@pytest.mark.parametrize("from_s3", [False, True], ids=["path", "s3"])
@pytest.mark.parametrize("num_files", [1, 3])
def test_all_that_is_needed_is_copied_as_it_is(
    memory_store: MemoryStore, tmp_path: Path, from_s3: bool, num_files: int
) -> None:
    path = save_directory(tmp_path / "m", num_files=num_files)
    uri = put(memory_store, path, "some/where") if from_s3 else str(path)
    base = fetch_base(list_base(uri, memory_store), memory_store)
    copied = set(SMALL) | ({"model.safetensors.index.json"} if num_files > 1 else set())
    assert set(base.files) == copied
    assert len(base.weights) == num_files
    for name, file in {**base.files, **base.weights}.items():
        data = memory_store.get(base.prefix + name)
        assert data == (path / name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for name, weights in base.weights.items():
        assert memory_store.get(base.prefix + weights.index_key) == block_index((path / name).read_bytes())
    assert {name: tensor.shape for name, tensor in base.tensors.items()} == {
        n: tuple(t.shape) for n, t in values().items()
    }
    assert base.uri == uri
    assert read_base(memory_store, base.fingerprint) == base


def test_a_base_that_stands_is_taken_without_a_look_at_the_source(memory_store: MemoryStore, directory: Path) -> None:
    source = source_of(memory_store, directory)
    base = fetch_base(source, memory_store)
    (directory / "model.safetensors").unlink()
    memory_store.fail["upload_stream"] = StoreError("must not be asked")
    assert fetch_base(source, memory_store) == base


def test_of_two_at_once_the_first_wins_and_both_get_its_manifest(memory_store: MemoryStore, directory: Path) -> None:
    source = list_base(put(memory_store, directory, "m"), memory_store)
    both_have_copied = threading.Barrier(2)

    def run_all(work: Callable[..., Any], jobs: Sequence[Any], store: Store) -> list[Any]:
        done = one_by_one(work, jobs, store)
        both_have_copied.wait(timeout=30)
        return done

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch_base(source, memory_store, run_all=run_all), range(2))
    assert first == second == read_base(memory_store, source.fingerprint)
    assert folders(memory_store, source) == [first.prefix.split("/")[-2]]


def test_one_that_is_overtaken_and_then_fails_gets_what_stands(memory_store: MemoryStore, directory: Path) -> None:
    """What the winner deletes of the loser's may make it stumble; there is nothing left for it to do."""
    source = list_base(put(memory_store, directory, "m"), memory_store)
    made: list[BaseManifest] = []

    def run_all(work: Callable[..., Any], jobs: Sequence[Any], store: Store) -> list[Any]:
        made.append(fetch_base(source, memory_store))
        raise NotFound("no such upload")

    assert fetch_base(source, memory_store, run_all=run_all) == made[0]
    assert folders(memory_store, source) == [made[0].prefix.split("/")[-2]]


class Killed(BaseException):
    pass


def test_after_a_kill_the_next_begins_anew_and_clears_up(memory_store: MemoryStore, tmp_path: Path) -> None:
    """A killed process leaves its folder and its unfinished upload; its successor has another nonce."""
    source = source_of(memory_store, save_directory(tmp_path / "m"))
    left = f"{layout.base(source.fingerprint)}deadbeef/"
    memory_store.upload(f"{left}model.safetensors", b"half")
    memory_store.leave_unfinished(f"{left}model-2.safetensors", started_s=time.time())
    base = fetch_base(source, memory_store)
    assert base.prefix != left
    assert folders(memory_store, source) == [base.prefix.split("/")[-2]]
    assert list(memory_store.unfinished_uploads("bases/")) == []


@pytest.mark.parametrize("error", [StoreError("down"), Killed()])
def test_one_that_fails_deletes_what_it_copied(
    memory_store: MemoryStore, directory: Path, error: BaseException
) -> None:
    source = list_base(put(memory_store, directory, "m"), memory_store)

    def run_all(work: Callable[..., Any], jobs: Sequence[Any], store: Store) -> list[Any]:
        one_by_one(work, jobs, store)
        assert len(folders(memory_store, source)) == 1
        raise error

    with pytest.raises(type(error)):
        fetch_base(source, memory_store, run_all=run_all)
    assert folders(memory_store, source) == []


def test_a_commit_whose_answer_is_lost_loses_no_files(memory_store: MemoryStore, directory: Path) -> None:
    """Whether the manifest was created is open then, so what it may speak of stays."""

    class Lossy(MemoryStore):
        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            raise StoreError("the answer was lost")

    store = Lossy(client=memory_store._connection)
    source = source_of(store, directory)
    with pytest.raises(StoreError, match="the answer was lost"):
        fetch_base(source, store)
    base = fetch_base(source, store)
    assert store.get(f"{base.prefix}config.json") == SMALL["config.json"]


class ChangesWhileCopied(MemoryStore):
    """Runs ``change`` when the first bytes of a stream were taken."""

    change: Callable[[], object] = staticmethod(lambda: None)

    def upload_stream(
        self, key: str, chunks: Iterable[bytes | memoryview], *, once: bool = False, size_bytes: int = 0
    ) -> None:
        def changing() -> Iterable[bytes | memoryview]:
            self.change()
            yield from chunks

        super().upload_stream(key, changing(), once=once, size_bytes=size_bytes)


@pytest.mark.parametrize("how", ["other bytes", "shorter", "longer", "gone"])
def test_a_file_that_changes_while_it_is_copied_is_never_committed(directory: Path, how: str) -> None:
    store = ChangesWhileCopied()
    source = source_of(store, directory)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "other bytes": lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "shorter": lambda: path.write_bytes(data[:-1]),
        "longer": lambda: path.write_bytes(data + b"x"),
        "gone": path.unlink,
    }
    store.change = changes[how]  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match=r"model.safetensors is not what it was when it was listed"):
        fetch_base(source, store)
    assert [key for key in store.objects if key.startswith("bases/")] == []


@pytest.mark.parametrize("how", ["other bytes", "gone"])
def test_an_object_that_changes_while_it_is_copied_is_never_committed(directory: Path, how: str) -> None:
    store = ChangesWhileCopied()
    source = list_base(put(store, directory, "m"), store)
    place, data = store.at("models"), (directory / "model.safetensors").read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "other bytes": lambda: place.tamper("m/model.safetensors", data[:-1] + bytes([data[-1] ^ 1])),
        "gone": lambda: place.delete(["m/model.safetensors"]),
    }
    store.change = changes[how]  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match=r"model.safetensors is not what it was when it was listed"):
        fetch_base(source, store)
    assert [key for key in store.objects if key.startswith("bases/")] == []


def test_a_config_that_changed_since_the_listing_is_seen(memory_store: MemoryStore, directory: Path) -> None:
    source = source_of(memory_store, directory)
    (directory / "config.json").write_bytes(b'{"model_type": "gpt2"}')
    with pytest.raises(IntegrityError, match=r"config.json is not what it was"):
        fetch_base(source, memory_store)


def test_weights_whose_header_lies_are_one_clear_error(memory_store: MemoryStore, directory: Path) -> None:
    lie = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(lie, bytes(12)))
    with pytest.raises(RunError, match=rf"{directory}/model.safetensors is not a sound safetensors file"):
        fetch_base(source_of(memory_store, directory), memory_store)
    assert memory_store.objects == {}


def test_quantised_weights_are_refused_before_any_is_copied(memory_store: MemoryStore, directory: Path) -> None:
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
    )
    memory_store.fail["upload_stream"] = AssertionError("too late")
    with pytest.raises(RunError, match="quantised by awq"):
        fetch_base(source_of(memory_store, directory), memory_store)


def test_a_tensor_in_two_files_is_where_the_index_says(memory_store: MemoryStore, tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", num_files=2)
    both = {"embed.weight": torch.ones(2), "extra": torch.zeros(1)}
    second = "model-00002-of-00002.safetensors"
    kept = {name: tensor for place, (name, tensor) in enumerate(values().items()) if place % 2 == 1}
    save_file({**kept, **both}, path / second)
    base = fetch_base(source_of(memory_store, path), memory_store)
    assert base.tensors["embed.weight"].file == "model-00001-of-00002.safetensors"
    assert base.tensors["extra"].file == second  # in no index, but in one file only


@pytest.mark.parametrize("lie", ["names a tensor that is nowhere", "is silent on a tensor in two files"])
def test_an_index_that_does_not_fit_is_refused(memory_store: MemoryStore, tmp_path: Path, lie: str) -> None:
    path = save_directory(tmp_path / "m", num_files=2)
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    if "nowhere" in lie:
        document["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    else:
        for file in set(document["weight_map"].values()):
            save_file({"ghost": torch.zeros(1), file: torch.zeros(1)}, path / file)
        document["weight_map"] = {file: file for file in set(document["weight_map"].values())}
    index.write_text(json.dumps(document))
    with pytest.raises(RunError, match=r"does not fit its weight files: ghost"):
        fetch_base(source_of(memory_store, path), memory_store)


def test_tied_and_doubled_tensors_each_keep_their_place(memory_store: MemoryStore, tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    tied = fetch_base(source_of(memory_store, save_directory(tmp_path / "t", {"embed": weight})), memory_store)
    assert set(tied.tensors) == {"embed"}
    doubled = save_directory(tmp_path / "d", {"embed": weight, "lm_head": weight.clone()})
    base = fetch_base(source_of(memory_store, doubled), memory_store)
    assert base.tensors["embed"].offset != base.tensors["lm_head"].offset


def test_trusted_code_is_copied_and_other_code_is_not(memory_store: MemoryStore, directory: Path) -> None:
    plain = fetch_base(source_of(memory_store, directory), memory_store)
    trusted = fetch_base(list_base(str(directory), memory_store, trust_remote_code=True), memory_store)
    assert "modeling_own.py" not in plain.files
    assert memory_store.get(f"{trusted.prefix}modeling_own.py") == b"boom"


def test_each_weight_file_is_a_job_of_its_own(memory_store: MemoryStore, tmp_path: Path) -> None:
    uri = put(memory_store, save_directory(tmp_path / "m", num_files=3), "m")
    seen: list[str] = []

    def run_all(work: Callable[..., Any], jobs: Sequence[WeightJob], store: Store) -> list[Any]:
        seen.extend(job.file.path for job in jobs)
        return one_by_one(work, jobs, store)

    base = fetch_base(list_base(uri, memory_store), memory_store, run_all=run_all)
    assert seen == sorted(base.weights)


def test_a_file_too_large_to_be_a_config_is_refused(
    memory_store: MemoryStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.pretrained.copy._MAX_SMALL_BYTES", 10)
    with pytest.raises(RunError, match=r"of a config or tokenizer file the limit is 10"):
        fetch_base(source_of(memory_store, directory), memory_store)
