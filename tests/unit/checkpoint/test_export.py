"""The exported files are what safetensors reads, whatever the cut and the precision."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import safetensors.torch
import torch

from orchestrator.checkpoint.catalog import read_manifest
from orchestrator.checkpoint.export import export_file, plan_files, weight_index, write_file
from orchestrator.checkpoint.resume import CheckpointReader
from orchestrator.errors import IntegrityError
from orchestrator.store import claim_attempt, layout
from tests.unit.checkpoint.states import random_values
from tests.unit.checkpoint.test_save_and_resume import Buffers, flip, save
from tests.unit.fakes import MemoryStore

# Odd numbers of elements, so that what follows is aligned only if the order sees to it.
SHAPES: dict[str, tuple[int, ...]] = {"emb": (7, 5), "norm": (3,), "scale": (), "head": (5, 9)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def reader(memory_store: MemoryStore) -> CheckpointReader:
    attempt = claim_attempt(memory_store, "run-1", facts={})
    assert save(memory_store, attempt, 4, shapes=SHAPES, world_size=3, module=Buffers(5)) == [None] * 3
    return CheckpointReader(memory_store, "run-1", read_manifest(memory_store, "run-1", 4)[0])


def write_all(reader: CheckpointReader, files: Any, dtype: str) -> dict[str, torch.Tensor]:
    """What safetensors reads from all files together."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        out = io.BytesIO()
        exported = write_file(reader, file, out, dtype=dtype)
        assert exported.size_bytes == len(out.getvalue())
        tensors = safetensors.torch.load(out.getvalue())
        assert tensors.keys() == {tensor.name for tensor in file.tensors}
        assert not tensors.keys() & found.keys()
        found |= tensors
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_what_comes_out_is_what_went_in(reader: CheckpointReader, dtype: str, max_shard_bytes: int) -> None:
    files = plan_files(reader.manifest, dtype=dtype, max_shard_bytes=max_shard_bytes)
    found = write_all(reader, files, dtype)
    values = random_values(SHAPES)
    for name, shape in SHAPES.items():
        assert torch.equal(found[name], values[name]["fp32"].view(shape).to(DTYPES[dtype]))
    buffers = Buffers(5).state_dict()
    assert found.keys() == SHAPES.keys() | buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(found[name], buffer)


def test_one_file_has_the_plain_name_and_no_index(reader: CheckpointReader) -> None:
    files = plan_files(reader.manifest, dtype="fp32", max_shard_bytes=10**9)
    assert [file.name for file in files] == ["model.safetensors"]
    assert weight_index(files) is None
    assert len(files[0].header) % 8 == 0


def test_shards_keep_to_the_limit_and_the_index_finds_each_tensor(reader: CheckpointReader) -> None:
    files = plan_files(reader.manifest, dtype="fp32", max_shard_bytes=150)
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert len(file.tensors) == 1 or sum(tensor.size_bytes for tensor in file.tensors) <= 150
    index = json.loads(weight_index(files) or b"")
    assert index["weight_map"] == {tensor.name: file.name for file in files for tensor in file.tensors}
    assert index["metadata"]["total_size"] == sum(tensor.size_bytes for file in files for tensor in file.tensors)


def test_a_file_in_the_store_is_what_was_told_of_it(reader: CheckpointReader, memory_store: MemoryStore) -> None:
    (file,) = plan_files(reader.manifest, dtype="fp32", max_shard_bytes=10**9)
    exported = export_file(reader, file, memory_store, "export/", dtype="fp32")
    data = memory_store.get_verified("export/model.safetensors", sha256=exported.sha256, size_bytes=exported.size_bytes)
    assert data.startswith(file.header)


def test_damaged_bytes_are_not_exported(reader: CheckpointReader, memory_store: MemoryStore) -> None:
    flip(memory_store, layout.checkpoint("run-1", 4) + reader.manifest.files[2].key)
    (file,) = plan_files(reader.manifest, dtype="fp32", max_shard_bytes=10**9)
    with pytest.raises(IntegrityError, match="block 0 "):
        export_file(reader, file, memory_store, "export/", dtype="fp32")
    assert not [key for key in memory_store.objects if key.startswith("export/")]
