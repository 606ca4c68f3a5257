"""A task in its run: what it may be trained on, and what of a pretrained model it takes over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from orchestrator.errors import NotFound, SpecError
from orchestrator.pretrained.source import list_base
from tests.tiny_model import make_tokenizer
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.bases import TEMPLATE, TINY, dataset_manifest, fetched, run_spec, save_base
from workloads.fetch_base import fetch_base
from workloads.tasks import check_task, task_of
from workloads.tasks.base_context import base_context

JSONL = {"train": "data/*.jsonl", "format": "jsonl", "sequence_length": 16}
LABELLED = {**JSONL, "label_field": "kind"}
MESSAGES = {"train": "data/*.jsonl", "format": "messages", "sequence_length": 16}
BERT = {"architecture": {"model_type": "bert", **TINY}}


@pytest.fixture(autouse=True)
def node_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": MESSAGES},
        {"task": "sequence-classification", "data": LABELLED, "model": BERT},
        {"task": "sequence-classification", "data": LABELLED},
    ],
)
def test_what_fits_together(changes: dict[str, Any]) -> None:
    check_task(run_spec(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "sequence-classification", "data": JSONL},
            "task: sequence-classification takes labelled texts, and data gives plain text. Set data.label_field to "
            "the field that holds the class",
        ),
        (
            {"task": "sequence-classification", "data": MESSAGES},
            "takes labelled texts, and data gives conversations. Set data.label_field",
        ),
        (
            {"data": LABELLED},
            "task: causal-lm takes plain text or conversations, and data gives labelled texts. Remove "
            "data.label_field, or set task to sequence-classification.",
        ),
        ({"data": MESSAGES, "model": {"architecture": {"model_type": "mamba"}}}, "the type linear_attention are not"),
        ({"data": MESSAGES, "model": {"architecture": {"model_type": "opt"}}}, "models of the type opt are not"),
        (
            {"model": {"architecture": {"model_type": "t5"}}},
            "model.architecture.model_type: transformers has no CausalLM model of the type t5. Use another model",
        ),
        (
            {"task": "sequence-classification", "data": {**LABELLED, "sequence_length": 65}, "model": BERT},
            "data.sequence_length: 65 is above the 64 positions that the model has. Set it to 64 or less",
        ),
        ({"task": "sequence-clasification"}, "built in are causal-lm, sequence-classification"),
    ],
)
def test_what_does_not_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_task(run_spec(**changes))
    assert message in str(caught.value)


def test_a_prepared_dataset_says_itself_what_it_holds() -> None:
    spec = run_spec(data={"dataset": "tiny", "sequence_length": 16}, task="sequence-classification", model=BERT)
    check_task(spec)
    assert task_of(spec, dataset_manifest(kind="labelled", classes=("a", "b"))).context.classes == ("a", "b")
    with pytest.raises(SpecError, match="takes labelled texts, and data gives conversations"):
        task_of(spec, dataset_manifest(kind="packed"))


def pretrained(directory: Path, **changes: Any) -> Any:
    return run_spec(**{"model": {"pretrained": str(directory)}, **changes})


def test_a_base_gives_the_config(memory_store: MemoryStore, tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base", rms_norm_eps=1e-3)
    spec = pretrained(directory, data=MESSAGES)
    check_task(spec)  # before it is fetched
    base = fetched(memory_store, directory, spec)
    check_task(spec, base)
    task = task_of(spec, dataset_manifest(kind="packed", whole_tokenizer=True), base)
    config = task.model_config()
    assert (config.model_type, config.rms_norm_eps, config.vocab_size) == ("llama", 1e-3, 384)
    assert task.remote_code == {"trust_remote_code": False}
    assert not list(base.directory.glob("*.safetensors"))


def test_no_base_for_a_run_from_scratch(memory_store: MemoryStore) -> None:
    assert base_context(run_spec(), memory_store, "") is None
    with pytest.raises(NotFound):
        base_context(pretrained(Path("/nowhere")), memory_store, "0" * 16)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"vocab_size": 300}, {}, "gives 384 ids, but the model's embedding has 300 rows"),
        ({}, {"data": {**JSONL, "sequence_length": 65}}, "data.sequence_length: 65 is above the 64 positions"),
        ({"model_type": "bert"}, {"data": MESSAGES}, "models of the type bert are not known to keep them apart"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    memory_store: MemoryStore, tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    directory = save_base(tmp_path / "base", **fields)
    spec = pretrained(directory, **changes)
    with pytest.raises(SpecError) as caught:
        check_task(spec, fetched(memory_store, directory, spec))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llamma"}, "does not take the config"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
            "A model that brings its own code needs model.trust_remote_code",
        ),
    ],
)
def test_an_unknown_architecture_is_refused(
    memory_store: MemoryStore, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory = save_base(tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    (directory / "own.py").write_text("raise SystemExit('code that nobody trusted has run')\n")
    spec = pretrained(directory)
    with pytest.raises(SpecError) as caught:
        check_task(spec, fetched(memory_store, directory, spec))
    assert message in str(caught.value)


def test_code_beside_the_weights_runs_where_it_is_trusted(memory_store: MemoryStore, tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    spec = pretrained(directory, model={"pretrained": str(directory), "trust_remote_code": True})
    manifest = fetch_base(list_base(str(directory), memory_store, trust_remote_code=True), memory_store)
    base = base_context(spec, memory_store, manifest.fingerprint)
    task = task_of(spec, dataset_manifest(whole_tokenizer=True), base)
    assert type(task.model_config()).__name__ == "OwnConfig"


def test_a_dataset_with_a_tokenizer_of_its_own_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base")
    spec = pretrained(directory, data={"dataset": "tiny", "sequence_length": 16})
    with pytest.raises(SpecError, match=r"tiny@0123456789abcdef was prepared with a tokenizer of its own"):
        task_of(spec, dataset_manifest(), fetched(memory_store, directory, spec))


@pytest.mark.parametrize("from_dataset", [True, False])
def test_the_whole_tokenizer_is_exported(memory_store: MemoryStore, tmp_path: Path, from_dataset: bool) -> None:
    directory = save_base(tmp_path / "base")
    generation = {"eos_token_id": [0, 5], "temperature": 0.7, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    spec = pretrained(directory)
    task = task_of(spec, dataset_manifest(whole_tokenizer=True), fetched(memory_store, directory, spec))
    exported = tmp_path / "exported"
    exported.mkdir()
    alone = tmp_path / "dataset" / "tokenizer.json"
    alone.parent.mkdir()
    make_tokenizer().save(str(alone))
    tokenizer = directory / "tokenizer.json" if from_dataset else alone
    task.save_assets(exported, tokenizer=tokenizer, dtype="bf16")
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    assert loaded.get_chat_template() == TEMPLATE
    assert loaded.eos_token == "<|endoftext|>"
    assert json.loads((exported / "generation_config.json").read_text()) == generation
    config = json.loads((exported / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert "/" not in json.dumps({**config, "transformers_version": ""})  # no path of this node
    assert not list(exported.glob("*.safetensors"))
