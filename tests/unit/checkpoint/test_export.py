"""The exported files are what safetensors reads, whatever the cut and the precision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.export import (
    WINDOW_BYTES,
    FileLayout,
    export_to_directory,
    export_to_store,
    plan_files,
    stream,
    weight_index,
    windows,
)
from orchestrator.checkpoint.format import DTYPE_BYTES
from orchestrator.checkpoint.sources import TensorLayout, Weights, open_weights
from orchestrator.errors import EnvironmentUnusable, IntegrityError, RunError
from tests.unit.checkpoint.saving import Buffers, flip, frozen_values, manifest_at, new_group, save
from tests.unit.checkpoint.states import random_values
from tests.unit.fakes import MemoryStore

# Odd numbers of elements, so that what follows is aligned only if the order sees to it.
SHAPES: dict[str, tuple[int, ...]] = {"tok": (7, 5), "norm": (3,), "scale": (), "head": (5, 9), "empty": (0, 4)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL = 10**9


@pytest.fixture
def weights(memory_store: MemoryStore) -> Weights:
    errors = save(
        memory_store, new_group(memory_store), 4, shapes=SHAPES, world_size=3, module=Buffers(5),
        frozen=frozen_values(), frozen_is_replicated=False,
    )  # fmt: skip
    assert errors == [None] * 3
    return open_weights(memory_store, *manifest_at(memory_store, 4))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("max_shard_bytes", [1, 100, ALL])
def test_what_comes_out_is_what_went_in(
    weights: Weights, memory_store: MemoryStore, tmp_path: Path, dtype: str, max_shard_bytes: int
) -> None:
    found: dict[str, torch.Tensor] = {}
    for file in plan_files(weights.manifest, dtype=dtype, max_shard_bytes=max_shard_bytes):
        assert len(file.header) % 8 == 0
        exported = export_to_directory(weights, file, tmp_path)
        assert exported == export_to_store(weights, file, memory_store, "export/")
        data = (tmp_path / file.name).read_bytes()
        assert (exported.size_bytes, exported.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert memory_store.objects["export/" + file.name] == data
        tensors = safetensors.torch.load_file(tmp_path / file.name)
        assert tensors.keys() == {tensor.name for tensor in file.tensors}
        assert not tensors.keys() & found.keys()
        found |= tensors
    assert not list(tmp_path.glob(".*"))
    expected = {name: v["fp32"].view(SHAPES[name]).to(DTYPES[dtype]) for name, v in random_values(SHAPES).items()}
    for name, value in frozen_values().items():
        expected[name] = value.to(DTYPES[dtype]) if value.dtype.is_floating_point else value
    expected |= Buffers(5).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(-1), value.view(-1)), name
    assert (found["emb"].shape, found["none"].shape, found["empty"].shape) == ((5, 3), (0, 2), (0, 4))


def test_one_file_has_the_plain_name_and_no_index(weights: Weights) -> None:
    files = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=ALL)
    assert [file.name for file in files] == ["model.safetensors"]
    assert weight_index(files) is None


def test_shards_keep_to_the_limit_and_the_index_finds_each_tensor(weights: Weights) -> None:
    files = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=150)
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = sum(tensor.size_bytes for tensor in file.tensors)
        assert held <= 150 or len([tensor for tensor in file.tensors if tensor.numel]) == 1
    index = json.loads(weight_index(files) or b"")
    assert index["weight_map"] == {tensor.name: file.name for file in files for tensor in file.tensors}
    assert index["metadata"]["total_size"] == sum(tensor.size_bytes for file in files for tensor in file.tensors)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["F32", "F64", "BF16", "BOOL"]), st.integers(0, 3 * WINDOW_BYTES)), max_size=8)
)
def test_windows_hold_each_element_once_in_order_and_are_bounded(tensors: list[tuple[str, int]]) -> None:
    layouts = tuple(
        TensorLayout(name=str(i), source=str(i), kind="buffer", stored=dtype, dtype=dtype, shape=(n,), numel=n)
        for i, (dtype, n) in enumerate(tensors)
    )
    found: dict[str, int] = {}
    order: list[str] = []
    for window in windows(FileLayout(name="x", tensors=layouts)):
        assert 0 < sum(s.length * DTYPE_BYTES[s.tensor.stored] for s in window) <= WINDOW_BYTES
        for part in window:
            assert part.start == found.get(part.tensor.name, 0)
            assert part.length > 0
            found[part.tensor.name] = part.start + part.length
            order.append(part.tensor.name)
    assert found == {tensor.name: tensor.numel for tensor in layouts if tensor.numel}
    assert order == sorted(order, key=int)


def test_a_tensor_larger_than_many_windows_comes_out_whole(memory_store: MemoryStore, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"big": (5 * WINDOW_BYTES // 8 + 3,), "small": (3,)}
    save(memory_store, new_group(memory_store), 4, shapes=shapes, world_size=3)
    weights = open_weights(memory_store, *manifest_at(memory_store, 4))
    (file,) = plan_files(weights.manifest, dtype="bf16", max_shard_bytes=ALL)
    assert len(list(windows(file))) == 3
    export_to_directory(weights, file, tmp_path)
    found = safetensors.torch.load_file(tmp_path / file.name)
    for name, values in random_values(shapes).items():
        assert torch.equal(found[name], values["fp32"].to(torch.bfloat16))


# -- failure


def test_damaged_bytes_are_not_exported(weights: Weights, memory_store: MemoryStore, tmp_path: Path) -> None:
    folder, manifest = manifest_at(memory_store, 4)
    flip(memory_store, folder.prefix + manifest.files[2].key)
    (file,) = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=ALL)
    with pytest.raises(IntegrityError, match="block 0 "):
        export_to_store(weights, file, memory_store, "export/")
    with pytest.raises(IntegrityError, match="block 0 "):
        export_to_directory(weights, file, tmp_path)
    assert not [key for key in memory_store.objects if key.startswith("export/")]
    assert list(tmp_path.iterdir()) == []


def test_what_fp16_cannot_hold_leaves_no_file(memory_store: MemoryStore, tmp_path: Path) -> None:
    values = random_values(SHAPES)
    values["norm"]["fp32"][1] = 1e6
    save(memory_store, new_group(memory_store), 4, shapes=SHAPES, values=values)
    weights = open_weights(memory_store, *manifest_at(memory_store, 4))
    (file,) = plan_files(weights.manifest, dtype="fp16", max_shard_bytes=ALL)
    with pytest.raises(RunError, match=r"norm holds 1e\+06"):
        export_to_directory(weights, file, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_to_is_named(weights: Weights, tmp_path: Path) -> None:
    (file,) = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=ALL)
    with pytest.raises(EnvironmentUnusable, match=r"model\.safetensors cannot be written to .*nowhere"):
        export_to_directory(weights, file, tmp_path / "nowhere")


def test_a_stream_that_is_left_early_ends(weights: Weights) -> None:
    (file,) = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=ALL)
    chunks = stream(weights, file)
    assert bytes(next(chunks)) == file.header
    next(chunks)
    chunks.close()
    assert list(chunks) == []
