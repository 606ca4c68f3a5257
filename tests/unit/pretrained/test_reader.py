"""Any elements of any tensor, in the dtype that is asked for, and only where they verify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.checkpoint.tensors import byte_view
from orchestrator.errors import IntegrityError, NotFound, RunError
from orchestrator.pretrained import reader as reader_module
from orchestrator.pretrained.format import BaseManifest
from orchestrator.pretrained.reader import BasePiece, BaseReader
from orchestrator.pretrained.source import list_base
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import save_directory, values
from workloads.fetch_base import fetch_base

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
FLOATS = ["embed.weight", "layer.half", "layer.brain", "norm.weight", "scalar", "nothing"]


def fetched(store: MemoryStore, directory: Path, tensors: dict[str, Tensor] | None = None, *, files: int = 1):  # type: ignore[no-untyped-def]
    return fetch_base(list_base(str(save_directory(directory, tensors, num_files=files)), store), store)


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def base(request: pytest.FixtureRequest, memory_store: MemoryStore, tmp_path: Path) -> BaseManifest:
    made: BaseManifest = fetched(memory_store, tmp_path / "m", files=request.param)
    return made


def piece(tensor: str, start: int, target: Tensor, dtype: str) -> BasePiece:
    return BasePiece(tensor=tensor, start=start, target=byte_view(target), dtype=dtype)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_whole_tensors_come_as_torch_would_convert_them(
    memory_store: MemoryStore, base: BaseManifest, dtype: str
) -> None:
    targets = {name: torch.full((values()[name].numel(),), 7, dtype=DTYPES[dtype]) for name in FLOATS}
    BaseReader(memory_store, base).read([piece(name, 0, target, dtype) for name, target in targets.items()])
    for name, target in targets.items():
        assert torch.equal(target.reshape(values()[name].shape), values()[name].to(DTYPES[dtype])), name


def test_integers_come_as_they_are(memory_store: MemoryStore, base: BaseManifest) -> None:
    target = torch.zeros(12, dtype=torch.int64)
    BaseReader(memory_store, base).read([piece("position_ids", 0, target, "I64")])
    assert torch.equal(target, torch.arange(12))


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_elements_of_any_tensors(
    memory_store: MemoryStore, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = fetched(memory_store, tmp_path_factory.getbasetemp() / "any", files=2)
    pieces, expected = [], []
    for _ in range(data.draw(st.integers(1, 6))):
        name, dtype = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(["F32", "BF16", "F16"]))
        flat = values()[name].reshape(-1)
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        target = torch.full((stop - start,), 7, dtype=DTYPES[dtype])
        pieces.append(piece(name, start, target, dtype))
        expected.append((target, flat[start:stop].to(DTYPES[dtype])))
    BaseReader(memory_store, base).read(pieces)
    for target, wanted in expected:
        assert torch.equal(target, wanted)


def test_pieces_larger_than_a_request_and_a_conversion(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = {"big": torch.randn(1_500_000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)}
    base = fetched(memory_store, tmp_path / "big", big)
    monkeypatch.setattr(reader_module, "READ_BYTES", 2**20)
    monkeypatch.setattr(reader_module, "_CONVERT_BYTES", 2**16)
    target = torch.zeros(1_400_001)
    BaseReader(memory_store, base).read([piece("big", 77, target, "F32")])
    assert torch.equal(target, big["big"][77 : 77 + 1_400_001].float())


def test_a_small_read_fetches_little(memory_store: MemoryStore, tmp_path: Path) -> None:
    base = fetched(memory_store, tmp_path / "m", {"w": torch.arange(1_000_000.0)})
    reader, target = BaseReader(memory_store, base), torch.zeros(1000)
    reader.read([piece("w", 500_000, target, "F32")])
    assert torch.equal(target, torch.arange(500_000.0, 501_000.0))
    assert reader.bytes_read <= 2 * 64 * 1024


@pytest.mark.parametrize("start", [0, 199_000])
def test_damage_is_named_and_never_used(memory_store: MemoryStore, tmp_path: Path, start: int) -> None:
    base = fetched(memory_store, tmp_path / "m", {"w": torch.arange(200_000.0)})
    key = f"{base.prefix}model.safetensors"
    data = bytearray(memory_store.get(key))
    data[base.tensors["w"].offset + 4 * start + 5] ^= 1
    memory_store.tamper(key, bytes(data))
    target = torch.zeros(100)
    with pytest.raises(
        IntegrityError, match=rf"model.safetensors: block {(base.tensors['w'].offset + 4 * start) // 65536} "
    ):
        BaseReader(memory_store, base).read([piece("w", start, target, "F32")])
    assert torch.equal(target, torch.zeros(100))
    with pytest.raises(IntegrityError):
        BaseReader(memory_store, base).check()


def test_a_damaged_index_and_a_lost_file_are_named(memory_store: MemoryStore, base: BaseManifest) -> None:
    BaseReader(memory_store, base).check()
    name, file = next(iter(base.weights.items()))
    memory_store.tamper(base.prefix + file.index_key, bytes(len(memory_store.get(base.prefix + file.index_key))))
    tensor = next(tensor for tensor, found in base.tensors.items() if found.file == name and found.dtype == "F32")
    with pytest.raises(IntegrityError, match=r"\.index holds"):
        BaseReader(memory_store, base).read([piece(tensor, 0, torch.zeros(1), "F32")])
    memory_store.delete([base.prefix + name, base.prefix + file.index_key])
    with pytest.raises(NotFound):
        BaseReader(memory_store, base).read([piece(tensor, 0, torch.zeros(1), "F32")])


@pytest.mark.parametrize(
    ("tensor", "start", "dtype", "message"),
    [
        ("lm_head.weight", 0, "F32", "has no tensor lm_head.weight"),
        ("norm.weight", 6, "F32", r"norm.weight has 7 elements; 8 bytes of F32 from element 6"),
        ("norm.weight", -1, "F32", "from element -1 on are not there"),
        ("position_ids", 0, "F32", "is stored as I64 and cannot be read as F32"),
        ("norm.weight", 0, "I64", "is stored as F32 and cannot be read as I64"),
    ],
)
def test_what_is_not_there_is_one_clear_error(
    memory_store: MemoryStore, base: BaseManifest, tensor: str, start: int, dtype: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        BaseReader(memory_store, base).read(
            [BasePiece(tensor=tensor, start=start, target=memoryview(bytearray(8)), dtype=dtype)]
        )


def test_half_an_element_is_refused(memory_store: MemoryStore, base: BaseManifest) -> None:
    with pytest.raises(RunError, match="6 bytes of F32"):
        BaseReader(memory_store, base).read([BasePiece(tensor="norm.weight", start=0, target=memoryview(bytearray(6)))])


def test_a_value_beyond_fp16_says_which_setting_helps(memory_store: MemoryStore, tmp_path: Path) -> None:
    base = fetched(memory_store, tmp_path / "m", {"w": torch.tensor([1.0, 1e6])})
    with pytest.raises(RunError, match="w holds 1e") as caught:
        BaseReader(memory_store, base).read([piece("w", 0, torch.zeros(2, dtype=torch.float16), "F16")])
    assert "train.precision" in caught.value.next_step
