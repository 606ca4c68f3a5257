"""Checkpoints of a fine-tuned model hold what was trained; the rest comes from the pretrained weights, checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.checkpoint.base import BaseUnusable
from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.checkpoint.export import export_to_directory, plan_files
from orchestrator.checkpoint.resume import load_base, load_weights, resume_newest
from orchestrator.checkpoint.sources import Slice, open_weights
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import IntegrityError, RunError
from orchestrator.pretrained.format import BaseManifest
from orchestrator.store import layout
from tests.unit.checkpoint.adapters import (
    CONV_PAIR,
    FROZEN,
    HEAD,
    LORA,
    PAIR,
    TENSORS,
    TRAINED,
    base_values,
    make_base,
    origin,
    save_adapter,
    state_of,
)
from tests.unit.checkpoint.saving import RUN, flip, manifest_at
from tests.unit.checkpoint.states import FakeState, random_values
from tests.unit.fakes import MemoryStore


@pytest.fixture
def base(memory_store: MemoryStore, tmp_path: Path) -> BaseManifest:
    return make_base(memory_store, tmp_path / "base", base_values())


def resumed(store: MemoryStore, rank: int, *, world_size: int) -> FakeState:
    state = state_of(rank, world_size=world_size)
    found = resume_newest(store, RUN, state, nn.Module(), rank=0)  # type: ignore[arg-type]
    assert found is not None
    return state


def test_each_rank_reads_its_own_part_of_the_base(memory_store: MemoryStore, base: BaseManifest) -> None:
    whole = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, (_, shape) in FROZEN.items()}
    for rank in range(3):
        state = state_of(rank)
        bytes_read = load_base(memory_store, origin(base), state, nn.Module())  # type: ignore[arg-type]
        assert bytes_read <= 1.3 * base.weights["model.safetensors"].size_bytes / 3 + 2 * 65536
        assert state.num_refreshed == 1
        for fragment in state.frozen():
            part = slice(fragment.start, fragment.start + fragment.length)
            whole[fragment.parameter][part] = fragment.tensors["frozen"].float()
    for name, tensor in TENSORS.items():
        expected = base_values()[tensor].to(FROZEN[name][0]).float().view(-1)
        assert torch.equal(whole[name], expected), name


def test_the_checkpoint_holds_the_adapter_alone_and_refers_to_the_rest(
    memory_store: MemoryStore, base: BaseManifest
) -> None:
    save_adapter(memory_store, base)
    folder, manifest = manifest_at(memory_store, 4)
    assert manifest.base == origin(base).base
    assert {name: f.base for name, f in manifest.frozen.items() if f.base} == TENSORS
    assert manifest.frozen[LORA.format("base_layer.weight")].lora == PAIR
    num_trained = sum(torch.Size(shape).numel() for shape in TRAINED.values())
    assert manifest.size_bytes < 12 * num_trained + 3 * 3000  # a header each
    assert verify(memory_store, folder).num_files == 3


def test_it_goes_on_at_another_size(memory_store: MemoryStore, base: BaseManifest) -> None:
    save_adapter(memory_store, base)
    for rank in range(2):
        state = resumed(memory_store, rank, world_size=2)
        for fragment in state.fragments():
            part = slice(fragment.start, fragment.start + fragment.length)
            for kind, tensor in fragment.tensors.items():
                assert torch.equal(tensor, random_values(TRAINED)[fragment.parameter][kind][part])
        for fragment in state.frozen():
            if fragment.parameter in TENSORS:
                part = slice(fragment.start, fragment.start + fragment.length)
                expected = base_values()[TENSORS[fragment.parameter]].to(FROZEN[fragment.parameter][0]).view(-1)
                assert torch.equal(fragment.tensors["frozen"], expected[part])


def test_a_base_that_is_gone_is_named(memory_store: MemoryStore, base: BaseManifest) -> None:
    save_adapter(memory_store, base)
    memory_store.delete([item.key for item in memory_store.list("bases/")])
    with pytest.raises(BaseUnusable, match=rf"are gone: .*{base.fingerprint}"):
        resumed(memory_store, 0, world_size=1)
    with pytest.raises(IntegrityError, match="are gone"):
        verify(memory_store, manifest_at(memory_store, 4)[0])
    with pytest.raises(IntegrityError, match="are gone"):
        open_weights(memory_store, *manifest_at(memory_store, 4))


def test_another_base_in_its_place_is_refused(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    save_adapter(memory_store, base)
    other = make_base(memory_store, tmp_path / "other", {**base_values(), "norm.weight": torch.ones(7)})
    lying = base.model_copy(update={"weights": other.weights})
    memory_store.tamper(layout.base_manifest(base.fingerprint), lying.sealed())
    with pytest.raises(BaseUnusable, match=r"are others \(digest"):
        resumed(memory_store, 0, world_size=1)


def test_damaged_pretrained_weights_are_no_reason_to_try_an_older_checkpoint(
    memory_store: MemoryStore, base: BaseManifest
) -> None:
    save_adapter(memory_store, base)
    flip(memory_store, base.prefix + "model.safetensors", 300_000)
    with pytest.raises(BaseUnusable, match="block 4 ") as caught:
        resumed(memory_store, 0, world_size=1)
    assert f"Delete bases/{base.fingerprint}/" in caught.value.next_step


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_verify_misses_the_bases_files(memory_store: MemoryStore, base: BaseManifest, name: str) -> None:
    save_adapter(memory_store, base)
    folder, _ = manifest_at(memory_store, 4)
    memory_store.tamper(base.prefix + name, memory_store.get(base.prefix + name)[:-1])
    with pytest.raises(BaseUnusable, match=rf"{name}, which the checkpoint refers to, holds \d+ bytes, not \d+"):
        verify(memory_store, folder)
    memory_store.delete([base.prefix + name])
    with pytest.raises(BaseUnusable, match=rf"{name}, which the checkpoint refers to, is gone"):
        verify(memory_store, folder)


def test_no_other_run_starts_from_an_adapter(memory_store: MemoryStore, base: BaseManifest) -> None:
    save_adapter(memory_store, base)
    state = state_of(0, world_size=1)
    with pytest.raises(RunError, match=f"step 4 of {RUN} holds an adapter") as caught:
        load_weights(memory_store, RUN, 4, state, nn.Module(), rank=0)  # type: ignore[arg-type]
    assert f"headway export {RUN}@4" in caught.value.next_step


def test_retention_leaves_bases_alone(memory_store: MemoryStore, base: BaseManifest) -> None:
    save_adapter(memory_store, base)
    before = {key for key in memory_store.objects if key.startswith("bases/")}
    save_adapter(memory_store, base, step=8, keep=1)
    assert committed_steps(memory_store, RUN) == [8]
    assert {key for key in memory_store.objects if key.startswith("bases/")} == before
    assert verify(memory_store, manifest_at(memory_store, 8)[0]).num_files == 3


def exported(store: MemoryStore, directory: Path, **options: str) -> dict[str, Tensor]:
    weights = open_weights(store, *manifest_at(store, 4))
    found: dict[str, Tensor] = {}
    for file in plan_files(weights.manifest, dtype="fp32", max_shard_bytes=100_000, **options):  # type: ignore[arg-type]
        export_to_directory(weights, file, directory)
        found |= safetensors.torch.load_file(directory / file.name)
    return found


def test_the_merged_export_is_base_plus_product(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    save_adapter(memory_store, base)
    found = exported(memory_store, tmp_path)
    trained = {name: v["fp32"].view(TRAINED[name]) for name, v in random_values(TRAINED).items()}
    values = base_values()
    assert found.keys() == {"lm.q.weight", "lm.c.weight", "lm.norm.weight", "score.weight"}
    torch.testing.assert_close(found["lm.q.weight"], values["lm.q.weight"] + 0.5 * trained[PAIR.b] @ trained[PAIR.a])
    product = (2.0 * trained[CONV_PAIR.b] @ trained[CONV_PAIR.a]).T
    torch.testing.assert_close(found["lm.c.weight"], values["lm.c.weight"].float() + product)
    assert torch.equal(found["lm.norm.weight"], values["norm.weight"])
    assert torch.equal(found["score.weight"], trained[HEAD.format("modules_to_save.default")])


@pytest.mark.parametrize(("start", "length"), [(0, 1), (299, 2), (300, 300), (17, 433), (149_999, 1)])
def test_a_window_may_cut_rows(memory_store: MemoryStore, base: BaseManifest, start: int, length: int) -> None:
    save_adapter(memory_store, base)
    weights = open_weights(memory_store, *manifest_at(memory_store, 4))
    (file,) = plan_files(weights.manifest, dtype="fp32", max_shard_bytes=10**9)
    (tensor,) = (tensor for tensor in file.tensors if tensor.name == "lm.q.weight")
    (data,) = weights.read([Slice(tensor=tensor, start=start, length=length)])
    trained = {name: v["fp32"].view(TRAINED[name]) for name, v in random_values(TRAINED).items()}
    whole = base_values()["lm.q.weight"] + 0.5 * trained[PAIR.b] @ trained[PAIR.a]
    found = torch.frombuffer(bytearray(data), dtype=torch.float32)
    torch.testing.assert_close(found, whole.view(-1)[start : start + length])


def test_the_adapter_export_has_pefts_names(memory_store: MemoryStore, base: BaseManifest, tmp_path: Path) -> None:
    save_adapter(memory_store, base)
    found = exported(memory_store, tmp_path, form="adapter")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert found.keys() == {
        "base_model.model.lm.q.lora_A.weight", "base_model.model.lm.q.lora_B.weight",
        "base_model.model.lm.c.lora_A.weight", "base_model.model.lm.c.lora_B.weight",
        "base_model.model.score.weight",
    }  # fmt: skip
    expected = random_values(TRAINED)[PAIR.a]["fp32"].view(TRAINED[PAIR.a])
    assert torch.equal(found["base_model.model.lm.q.lora_A.weight"], expected)


def test_an_adapter_that_would_not_give_the_model_back_is_refused(
    memory_store: MemoryStore, base: BaseManifest
) -> None:
    save_adapter(memory_store, base)
    manifest = manifest_at(memory_store, 4)[1]
    frozen = manifest.frozen["base_model.model.lm.norm.weight"].model_copy(update={"base": None})
    lacking = manifest.model_copy(update={"frozen": {**manifest.frozen, "base_model.model.lm.norm.weight": frozen}})
    with pytest.raises(RunError, match=r"lm\.norm\.weight is neither trained nor in the pretrained model"):
        plan_files(lacking, dtype="fp32", max_shard_bytes=10**9, form="adapter")
    with pytest.raises(RunError, match="it holds none"):
        plan_files(manifest.model_copy(update={"frozen": {}}), dtype="fp32", max_shard_bytes=10**9, form="adapter")
