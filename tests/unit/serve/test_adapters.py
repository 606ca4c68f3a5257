"""Versions that hold an adapter alone, and answer with the pretrained model that it belongs to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from orchestrator.errors import IntegrityError
from tests.tiny_classifier import save_classifier
from tests.tiny_model import make_version, save_model
from tests.unit.serve.adapters import save_adapter
from tests.unit.serve.scripted import FILES
from tests.unit.workloads.bases import save_base
from workloads.serve.admission import EngineSettings
from workloads.serve.classifier import TransformersClassifier
from workloads.serve.engine import Generation
from workloads.serve.engines import load_engine
from workloads.serve.transformers_engine import TransformersEngine

SETTINGS = EngineSettings(max_batch=1, max_queued=8, num_threads=1)
CLASSES = ("no", "yes")
TEXTS = ["def __init__(self", "naïve café", "x"]


def greedy(engine: TransformersEngine, prompt: list[int]) -> str:
    async def collect() -> str:
        asked = Generation(prompt=tuple(prompt), max_tokens=16, temperature=0.0)
        return "".join([piece.text async for piece in engine.generate(asked)])

    return asyncio.run(collect())


def test_it_generates_what_peft_does(tmp_path: Path) -> None:
    base, directory = save_model(tmp_path / "base", seed=1), tmp_path / "adapter"
    adapted = save_adapter(directory, base, auto_class="AutoModelForCausalLM")
    assert not (directory / "model.safetensors").exists()
    engine = load_engine(make_version(files=FILES), directory, SETTINGS, base=base)
    assert isinstance(engine, TransformersEngine)
    prompt = asyncio.run(engine.encode("def __init__"))
    ids = torch.tensor([prompt])
    said = adapted.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    found = greedy(engine, prompt)
    assert found == asyncio.run(engine.decode(said[0, len(prompt) :].tolist()))
    assert found != greedy(TransformersEngine.load(base, SETTINGS), prompt)


@pytest.mark.parametrize("with_head", [False, True], ids=["a base without a head", "a base with another head"])
def test_it_gives_the_classes_that_peft_does(tmp_path: Path, with_head: bool) -> None:
    base, directory = tmp_path / "base", tmp_path / "adapter"
    if with_head:
        save_classifier(base, seed=1)
    else:
        save_base(base, model_type="bert")
    labels = dict(enumerate(CLASSES))
    auto_class = "AutoModelForSequenceClassification"
    head = ("classifier",) if with_head else ("classifier", "bert.pooler")
    adapted = save_adapter(directory, base, auto_class=auto_class, head=head, id2label=labels, pad_token_id=0)
    version = make_version(files=FILES, task="sequence-classification")
    classifier = load_engine(version, directory, SETTINGS, base=base)
    assert isinstance(classifier, TransformersClassifier)
    assert classifier.labels == CLASSES
    for text in TEXTS:
        ids = asyncio.run(classifier.encode(text))
        with torch.inference_mode():
            expected = adapted(input_ids=torch.tensor([ids])).logits.softmax(-1)
        torch.testing.assert_close(
            torch.tensor(asyncio.run(classifier.classify([ids]))), expected, rtol=1e-5, atol=1e-5
        )


def test_without_its_base_it_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=1)
    save_adapter(tmp_path / "adapter", base, auto_class="AutoModelForCausalLM")
    with pytest.raises(IntegrityError, match="holds an adapter alone, and its version names no pretrained model"):
        load_engine(make_version(files=FILES), tmp_path / "adapter", SETTINGS)


def test_what_neither_the_base_nor_the_adapter_holds_is_not_made_up(tmp_path: Path) -> None:
    base, directory = save_base(tmp_path / "base", model_type="bert"), tmp_path / "adapter"
    labels = dict(enumerate(CLASSES))
    auto_class = "AutoModelForSequenceClassification"
    save_adapter(directory, base, auto_class=auto_class, head=("classifier",), id2label=labels, pad_token_id=0)
    version = make_version(files=FILES, task="sequence-classification")
    with pytest.raises(IntegrityError, match=r"neither holds bert\.pooler\.dense\.bias"):
        load_engine(version, directory, SETTINGS, base=base)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=1)
    save_adapter(tmp_path / "adapter", base, auto_class="AutoModelForCausalLM")
    other = save_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(IntegrityError, match="is no adapter of the model in"):
        load_engine(make_version(files=FILES), tmp_path / "adapter", SETTINGS, base=other)
