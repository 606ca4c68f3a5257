"""Classes of texts: the batch, the figures, and that a model learns, from scratch and from a pretrained one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.dataset.format import Split
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.rows import labelled_row, unpack_labelled
from orchestrator.store import layout
from tests.tiny_classifier import save_classifier
from tests.tiny_model import make_tokenizer
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.bases import TINY, dataset_manifest, fetched, run_spec, save_base
from tests.unit.workloads.preparing import FINGERPRINT, json_lines, prepare_here, put
from workloads.evaluate import summed
from workloads.serve.admission import EngineSettings
from workloads.serve.classifier import TransformersClassifier
from workloads.tasks import Samples, TaskContext, check_task, task_of
from workloads.tasks.sequence_classification import IGNORED, SequenceClassification, macro_f1

CLASSES = ("bad", "good", "odd")
LENGTH = 16
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **TINY},
    "llama": {"model_type": "llama", **TINY},
}
SPLIT = Split(shards=(), num_tokens=0, num_bytes=1, num_files=1)


def task_from_scratch(name: str) -> SequenceClassification:
    return SequenceClassification(
        TaskContext(
            architecture=ARCHITECTURES[name],
            vocab_size=384,
            end_of_text_id=0,
            sequence_length=LENGTH,
            sample_kind="labelled",
            classes=CLASSES,
        )
    )


@pytest.fixture(params=sorted(ARCHITECTURES))
def task(request: pytest.FixtureRequest) -> SequenceClassification:
    return task_from_scratch(request.param)


def samples(texts: list[tuple[int, list[int]]], *, num_padding: int = 0, pad_id: int = 9) -> Samples:
    """Class and tokens of each row, then padding as BatchFeed makes it."""
    padded = [*texts, *[texts[0]] * num_padding]
    rows = np.stack([labelled_row(label, ids, row_tokens=LENGTH + 1, pad_id=pad_id) for label, ids in padded])
    return Samples(rows=unpack_labelled(rows), num_real=len(texts), row_rng=np.random.default_rng)


TEXTS = [(0, [5, 6, 7]), (2, [8, 5]), (1, [20, 21, 22, 23, 24])]


def test_a_batch_is_as_long_as_its_longest_text(task: SequenceClassification) -> None:
    batch = task.collate(samples(TEXTS, num_padding=1))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 5, 0, 0, 0], [20, 21, 22, 23, 24], [5, 6, 7, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 5, 3]
    assert batch["labels"].tolist() == [0, 2, 1, IGNORED]
    assert task.num_targets(batch) == 3


def test_padding_counts_for_nothing(task: SequenceClassification) -> None:
    torch.manual_seed(0)
    model = task.build_model().eval()
    plain, padded = task.collate(samples(TEXTS)), task.collate(samples(TEXTS, num_padding=3, pad_id=77))
    alone = sum(float(task.loss_sum(model, task.collate(samples([text]))).detach()) for text in TEXTS)
    for batch in (plain, padded):
        assert float(task.loss_sum(model, batch).detach()) == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():
        assert task.eval_sums(model, plain) == pytest.approx(task.eval_sums(model, padded), rel=1e-5)


def test_a_batch_of_padding_alone_has_no_loss(task: SequenceClassification) -> None:
    batch = task.collate(samples(TEXTS))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    model = task.build_model().eval()
    assert float(task.loss_sum(model, batch).detach()) == 0.0
    with torch.no_grad():
        assert set(task.eval_sums(model, batch).values()) == {0.0}


class Scripted(torch.nn.Module):
    """Guesses the given classes."""

    def __init__(self, guesses: list[int]) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(guesses), len(CLASSES)).float() * 9

    def forward(self, **_: Any) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.logits)


def test_figures_are_those_of_a_count_by_hand() -> None:
    """Macro F1 by scikit-learn's definition; class 2 is guessed once and never there."""
    task = task_from_scratch("bert")
    labels, guesses = [0, 0, 0, 1, 1], [0, 0, 1, 1, 2]
    batch = task.collate(samples([(label, [5]) for label in labels], num_padding=0))
    sums = task.eval_sums(Scripted(guesses), batch)
    assert sums["correct"] == 3.0
    by_class = [[sums[f"{what}.{number}"] for what in ("tp", "fp", "fn")] for number in range(3)]
    assert by_class == [[2.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    figures = task.metrics(sums, num_targets=5, split=SPLIT)
    assert figures["accuracy"] == 0.6
    assert figures["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 4 + 0) / 3)
    assert figures["loss"] == pytest.approx(sums["loss"] / 5)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    sums = {f"{what}.{number}": 0.0 for what in ("tp", "fp", "fn") for number in range(3)}
    assert macro_f1({**sums, "tp.0": 4.0}, num_classes=3) == 1.0
    assert macro_f1(sums, num_classes=3) == 0.0


def learns(task: SequenceClassification, model: torch.nn.Module) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    batch = task.collate(samples(TEXTS * 2))
    model.train()
    losses = []
    for _ in range(15):
        loss = task.loss_sum(model, batch) / task.num_targets(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_falls(task: SequenceClassification) -> None:
    torch.manual_seed(0)
    learns(task, task.build_model())


def labelled_texts() -> list[dict[str, Any]]:
    code = [{"text": f"def f{number}(self): return {number}", "label": "code"} for number in range(40)]
    return [*code, *({"text": f"a café, the {number}th", "label": "prose"} for number in range(60))]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_texts_to_figures(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From scratch: prepared with a tokenizer of its own, trained, exported, evaluated in two shares, and served."""
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    spec = run_spec(
        task="sequence-classification",
        model={"architecture": ARCHITECTURES[name]},
        data={"train": "s3://corpus/**", "format": "jsonl", "label_field": "label", "eval_fraction": 0.2,
              "sequence_length": 32, "vocab_size": 300},
        train={"steps": 30, "micro_batch_size": 4},
    )  # fmt: skip
    check_task(spec)
    made = prepare_here(spec.data, put(memory_store, json_lines(labelled_texts())))
    task = task_of(spec, made.manifest)
    assert task.context.classes == ("code", "prose")
    torch.manual_seed(0)
    model: Any = task.build_model()
    reader = TokenReader(memory_store, made.manifest, made.manifest.train, sequence_length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(spec.train.steps or 0):
        indices = np.random.default_rng(step).permutation(reader.num_samples)[:16]
        batch = task.collate(Samples(rows=reader.rows(indices), num_real=16, row_rng=np.random.default_rng))
        (task.loss_sum(model, batch) / task.num_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    exported = tmp_path / "exported"
    model.save_pretrained(exported)
    (tmp_path / "tokenizer.json").write_bytes(memory_store.get(layout.dataset("here", FINGERPRINT) + "tokenizer.json"))
    task.save_assets(exported, tokenizer=tmp_path / "tokenizer.json", dtype="fp32")
    loaded = task.load_model(exported).eval()
    device = torch.device("cpu")
    batches = [
        batch
        for share in range(2)
        for batch in summed(spec, task, loaded, made.manifest, memory_store, share=share, num_shares=2, device=device)
    ]
    sums = {key: sum(batch.sums[key] for batch in batches) for key in batches[0].sums}
    num_targets = sum(batch.num_targets for batch in batches)
    held_out = TokenReader(memory_store, made.manifest, made.manifest.eval, sequence_length=32)
    assert num_targets == held_out.num_samples > 10
    figures = task.metrics(sums, num_targets=num_targets, split=made.manifest.eval)
    assert (figures["accuracy"], figures["f1"]) == (1.0, 1.0)
    assert figures["loss"] < 0.3

    classifier = TransformersClassifier.load(exported, EngineSettings(num_threads=1))
    trained = set()
    for split in (reader, held_out):
        rows = split.rows(np.arange(split.num_samples))
        for ids, length in zip(rows["tokens"].tolist(), rows["length"], strict=True):
            trained.add(tuple(ids[:length]))
    texts = [asyncio.run(classifier.encode(record["text"])) for record in labelled_texts()]
    assert {tuple(ids) for ids in texts} == trained
    likeliest = [scores.index(max(scores)) for scores in asyncio.run(classifier.classify(texts))]
    assert [classifier.labels[number] for number in likeliest] == [record["label"] for record in labelled_texts()]


def test_the_exported_directory_is_a_pipelines(task: SequenceClassification, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = task.build_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    task.save_assets(tmp_path / "model", tokenizer=tmp_path / "tokenizer.json", dtype="fp32")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "model"), top_k=None, device="cpu")
    scores = {score["label"]: score["score"] for score in pipeline(["def __init__(self"])[0]}
    ids = make_tokenizer().encode("def __init__(self").ids
    batch = task.collate(samples([(0, ids)]))
    with torch.inference_mode():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = dict(zip(CLASSES, logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, abs=1e-5)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.problem_type == "single_label_classification"
    assert config.label2id == {"bad": 0, "good": 1, "odd": 2}
    reloaded = task.load_model(tmp_path / "model").eval()
    with torch.inference_mode():
        assert torch.equal(reloaded(input_ids=batch["input_ids"]).logits, model(input_ids=batch["input_ids"]).logits)


def with_base(store: MemoryStore, directory: Path, **model: Any) -> SequenceClassification:
    spec = run_spec(
        task="sequence-classification",
        model={"pretrained": str(directory), **model},
        data={"train": "x", "format": "jsonl", "label_field": "kind", "sequence_length": LENGTH},
    )
    dataset = dataset_manifest(kind="labelled", classes=CLASSES, whole_tokenizer=True)
    task = task_of(spec, dataset, fetched(store, directory, spec))
    assert isinstance(task, SequenceClassification)
    task.check()
    return task


@pytest.mark.parametrize(("model_type", "head"), [("bert", "classifier"), ("llama", "score")])
def test_a_base_gets_a_new_head(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, head: str
) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    task = with_base(memory_store, save_base(tmp_path / "base", model_type=model_type))
    model = task.build_model()
    new = {name for name, _ in model.named_parameters() if task.may_be_new(model, name)}
    pooler = {f"bert.pooler.dense.{part}" for part in ("weight", "bias")}
    assert new == ({"classifier.weight", "classifier.bias"} | pooler if model_type == "bert" else {"score.weight"})
    assert head in task.head_modules(model)
    weight = model.get_submodule(head).weight
    assert weight.shape == (3, TINY["hidden_size"])
    assert 0.0 < float(weight.detach().std()) < 0.1  # initialised, and not what lay in memory
    assert task.model_config().pad_token_id == 0


def test_a_decoder_without_a_pad_token_takes_a_batch(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretrained one is evaluated as it is, for its loss before the training."""
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    directory = save_classifier(tmp_path / "base", seed=1, model_type="llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    task = with_base(memory_store, directory)
    model = task.load_model(directory).eval()
    with torch.no_grad():
        together = task.eval_sums(model, task.collate(samples(TEXTS)))["loss"]
        alone = sum(task.eval_sums(model, task.collate(samples([text])))["loss"] for text in TEXTS)
    assert together == pytest.approx(alone, rel=1e-5)


def test_an_adapter_leaves_the_head_trainable(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    directory = save_base(tmp_path / "base", model_type="bert")
    task = with_base(memory_store, directory, lora={"rank": 2, "target_modules": ["query"]})
    torch.manual_seed(0)
    model = task.build_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        f"base_model.model.{module}.modules_to_save.default.{part}"
        for module in ("classifier", "bert.pooler")
        for part in (("weight", "bias") if module == "classifier" else ("dense.weight", "dense.bias"))
    }
    # Stands in for the weights that the engine's loading fills in.
    pretrained = transformers.AutoModelForMaskedLM.from_pretrained(directory, use_safetensors=True).state_dict()
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in pretrained:
            parameter.data.copy_(pretrained[plain])
    learns(task, model)
