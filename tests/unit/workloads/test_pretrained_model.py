"""How a model without weights is built, and which of the files' tensors are its parameters'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from orchestrator.pretrained.format import BaseManifest
from orchestrator.pretrained.source import list_base
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.bases import dataset_manifest, run_spec, save_base
from tests.unit.workloads.bases import fetched as fetched_base
from workloads.fetch_base import fetch_base
from workloads.pretrained_model import adapter_config, origin_of, without_weights
from workloads.tasks import task_of

BERT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_labels": 3,
}  # fmt: skip


def bert(class_name: str) -> Any:
    return getattr(transformers, class_name)(transformers.BertConfig(**BERT))


def fetched(store: MemoryStore, directory: Path, model: Any) -> BaseManifest:
    model.save_pretrained(directory)
    return fetch_base(list_base(str(directory), store), store)


def test_parameters_are_on_the_meta_device_and_buffers_are_real() -> None:
    with without_weights():
        model = bert("BertForMaskedLM")
        bare = nn.Linear(3, 4, bias=False)
    assert all(parameter.is_meta for parameter in (*model.parameters(), *bare.parameters()))
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert list(model.buffers())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not any(parameter.is_meta for parameter in nn.Linear(3, 4).parameters())


def test_a_model_finds_its_own_tensors(memory_store: MemoryStore, tmp_path: Path) -> None:
    model = bert("BertForSequenceClassification")
    found = origin_of(model, fetched(memory_store, tmp_path / "base", model))
    assert found.tensors == {name: name for name, _ in model.named_parameters()}
    assert not found.lora


@pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM"])
def test_the_body_is_found_whatever_head_it_was_saved_with(
    memory_store: MemoryStore, tmp_path: Path, saved: str
) -> None:
    model = bert("BertForSequenceClassification")
    found = origin_of(model, fetched(memory_store, tmp_path / "base", bert(saved))).tensors
    prefix = "" if saved == "BertModel" else "bert."
    body = [name for name, _ in model.named_parameters() if not name.startswith("classifier.")]
    if saved == "BertForMaskedLM":  # has no pooler
        body = [name for name in body if ".pooler." not in name]
    assert found == {name: prefix + name.removeprefix("bert.") for name in body}


def test_norms_in_the_words_of_tensorflow_are_found(memory_store: MemoryStore, tmp_path: Path) -> None:
    model = bert("BertModel")
    manifest = fetched(memory_store, tmp_path / "base", model)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in manifest.tensors.items()
    }
    found = origin_of(model, manifest.model_copy(update={"tensors": renamed})).tensors
    assert found["embeddings.LayerNorm.weight"] == "embeddings.LayerNorm.gamma"
    assert set(found.values()) == set(renamed)


def test_another_shape_is_no_match(memory_store: MemoryStore, tmp_path: Path) -> None:
    saved = bert("BertForSequenceClassification")
    manifest = fetched(memory_store, tmp_path / "base", saved)
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**{**BERT, "num_labels": 5}))
    found = origin_of(other, manifest).tensors
    assert {name for name, _ in other.named_parameters()} - found.keys() == {"classifier.weight", "classifier.bias"}


def test_a_tied_weight_is_found_under_any_of_its_names(memory_store: MemoryStore, tmp_path: Path) -> None:
    model = bert("BertForMaskedLM")
    manifest = fetched(memory_store, tmp_path / "base", model)
    tensors = dict(manifest.tensors)
    tensors["cls.predictions.decoder.weight"] = tensors.pop("bert.embeddings.word_embeddings.weight")
    found = origin_of(model, manifest.model_copy(update={"tensors": tensors})).tensors
    assert found["bert.embeddings.word_embeddings.weight"] == "cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("uri", "name", "revision"),
    [("hf://org/name@" + 40 * "a", "org/name", 40 * "a"), ("s3://bucket/llama", "s3://bucket/llama", None)],
)
def test_peft_finds_the_base_where_it_looks_for_it(
    memory_store: MemoryStore, tmp_path: Path, uri: str, name: str, revision: str | None
) -> None:
    spec = run_spec(model={"pretrained": str(save_base(tmp_path / "base")), "lora": {"rank": 3, "alpha": 5.0}})
    base = fetched_base(memory_store, Path(str(spec.model.pretrained)), spec)
    task = task_of(spec, dataset_manifest(whole_tokenizer=True), base)
    config = adapter_config(task, base_name=uri)
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
    assert (config.r, config.lora_alpha, config.inference_mode) == (3, 5.0, True)
