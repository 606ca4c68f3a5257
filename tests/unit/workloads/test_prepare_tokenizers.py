"""The tokenizer that a run file gives, from the run's id to the plan; and tokenizers that are not the model's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import __version__
from orchestrator.commands.plan import size_of
from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import IntegrityError, SpecError
from orchestrator.runs import identify
from orchestrator.spec import DataSpec, RunSpec, parse
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from tests.unit.workloads import chat_templates as templates
from tests.unit.workloads.preparing import json_lines, prepare_here, prepare_with, put, talk, word_tokenizer
from workloads.prepare.vocabulary import require_vocabulary_of
from workloads.tasks import task_of

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def run_spec(path: Path | str, *, architecture: dict[str, Any] | None = None, **data: Any) -> RunSpec:
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": "given",
            "model": {"architecture": {**LLAMA, **HEADS, **(architecture or {})}},
            "data": {"train": "s3://corpus/**", "tokenizer": str(path), "eval_fraction": 0.3, **data},
            "train": {"steps": 1},
        }
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(word_tokenizer())
    return path


@pytest.fixture
def corpus(memory_store: MemoryStore) -> MemoryStore:
    for number in range(20):
        put(memory_store, f"w1 w{number} other".encode(), f"{number:04d}.txt")
    return memory_store


def test_it_is_part_of_the_datasets_fingerprint(corpus: MemoryStore, tokenizer: Path, tmp_path: Path) -> None:
    corpus.at("tokenizers").upload("a.json", tokenizer.read_bytes())
    here, there = (identify(run_spec(path), corpus, tmp_path) for path in (tokenizer, "s3://tokenizers/a.json"))
    assert here.dataset_fingerprint == there.dataset_fingerprint
    assert prepare_with(corpus, run_spec(tokenizer).data).fingerprint == here.dataset_fingerprint
    named = identify(run_spec(tokenizer, end_of_text="w3"), corpus, tmp_path)
    assert named.dataset_fingerprint != here.dataset_fingerprint
    assert named.tokenizer is not None
    assert named.tokenizer.end_of_text_id == 5
    tokenizer.write_bytes(word_tokenizer().replace(b'"w7"', b'"w70"'))
    assert identify(run_spec(tokenizer), corpus, tmp_path).dataset_fingerprint != here.dataset_fingerprint


def test_what_it_excludes_is_told() -> None:
    document: dict[str, Any] = run_spec("tokenizer.json").model_dump(mode="json", exclude_defaults=True)
    document["apiVersion"] = "headway/v1"
    with pytest.raises(SpecError, match=r"data\.tokenizer excludes model\.pretrained"):
        parse({**document, "model": {"pretrained": "base"}})
    with pytest.raises(SpecError, match="takes tokenizer only beside train"):
        parse({**document, "data": {"dataset": "given", "tokenizer": "tokenizer.json"}})
    with pytest.raises(SpecError, match="takes end_of_text only beside tokenizer"):
        parse({**document, "data": {"train": "s3://corpus/**", "end_of_text": "</s>"}})


def test_a_plan_counts_the_embeddings_that_it_needs(corpus: MemoryStore, tokenizer: Path) -> None:
    pytest.importorskip("transformers")
    given = size_of(run_spec(tokenizer), corpus).size
    assert given is not None
    assert given.vocab_size == 52
    corpus.at("tokenizers").upload("a.json", tokenizer.read_bytes())
    assert size_of(run_spec("s3://tokenizers/a.json"), corpus).size == given
    assert "no store is set" in size_of(run_spec("s3://tokenizers/a.json"), None).reason
    made = prepare_with(corpus, run_spec(tokenizer).data)
    prepared = run_spec(tokenizer).model_copy(update={"data": DataSpec(dataset=f"here@{made.fingerprint}")})
    assert size_of(prepared, corpus).size == given


def test_a_model_with_too_few_embeddings_is_refused(corpus: MemoryStore, tokenizer: Path) -> None:
    spec = run_spec(tokenizer, architecture={"vocab_size": 51})
    made = prepare_with(corpus, spec.data)
    with pytest.raises(SpecError, match=r"model\.architecture\.vocab_size: 51 is below the 52 tokens") as caught:
        task_of(spec, made)
    assert caught.value.next_step
    assert task_of(run_spec(tokenizer, architecture={"vocab_size": 52}), made)
    assert task_of(run_spec(tokenizer), made).model_config().vocab_size == 52


def test_a_dataset_of_another_pretrained_tokenizer_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    put(memory_store, json_lines([talk(number) for number in range(60)]))
    ours, other = (
        templates.save(tmp_path / str(size), templates.byte_level("chatml", templates.CHATML, vocab_size=size))
        for size in (300, 310)
    )
    data = DataSpec(train="s3://corpus/**", format="messages", eval_fraction=0.2, sequence_length=255)
    made = prepare_here(data, memory_store, ours).manifest
    require_vocabulary_of(base(ours), made, memory_store)
    with pytest.raises(SpecError, match="prepared with another tokenizer than that of s3://models/base") as caught:
        require_vocabulary_of(base(other), made, memory_store)
    assert "data.train" in caught.value.next_step


def test_what_other_versions_of_the_packages_left_is_named(
    corpus: MemoryStore, tokenizer: Path, tmp_path: Path
) -> None:
    spec = run_spec(tokenizer)
    prefix = layout.dataset("here", identify(spec, corpus, tmp_path).dataset_fingerprint)
    corpus.create(f"{prefix}tokenizer.json", tokenizer.read_bytes())
    corpus.tamper(f"{prefix}tokenizer.json", tokenizer.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json has other bytes than are made now") as caught:
        prepare_with(corpus, spec.data)
    assert "Delete the folder of this preparation" in caught.value.next_step
    corpus.tamper(f"{prefix}tokenizer.json", tokenizer.read_bytes())
    prepare_with(corpus, spec.data)


def base(directory: Path) -> Any:
    """As much of a pretrained model as its tokenizer needs."""
    manifest = SimpleNamespace(uri="s3://models/base")
    return SimpleNamespace(directory=directory, manifest=manifest, trust_remote_code=False)


def test_the_manifest_says_what_it_was_made_with(corpus: MemoryStore, tokenizer: Path) -> None:
    made: DatasetManifest = prepare_with(corpus, run_spec(tokenizer).data)
    assert made.lineage is not None
    assert made.lineage.code_version == __version__
    assert made.tokenizer.sha256 == hashlib.sha256(word_tokenizer()).hexdigest()
