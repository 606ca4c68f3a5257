"""A task in its run: what it may be trained on, and what of a pretrained model it takes over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.dataset.format import Split
from orchestrator.errors import NotFound, SpecError
from orchestrator.pretrained.source import list_base
from tests.tiny_model import make_tokenizer
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.bases import TEMPLATE, TINY, dataset_manifest, fetched, run_spec, save_base
from workloads.fetch_base import fetch_base
from workloads.tasks import Samples, Task, TaskContext, check_task, load_task, task_of
from workloads.tasks.base_context import base_context

JSONL = {"train": "data/*.jsonl", "format": "jsonl", "sequence_length": 16}
PAGE = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()
LABELLED = {**JSONL, "label_field": "kind"}
MESSAGES = {"train": "data/*.jsonl", "format": "messages", "sequence_length": 16}
NUM_TOKENS = make_tokenizer().get_vocab_size()
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
    assert (config.model_type, config.rms_norm_eps, config.vocab_size) == ("llama", 1e-3, NUM_TOKENS)
    assert task.remote_code == {"trust_remote_code": False}
    assert not list(base.directory.glob("*.safetensors"))


def test_no_base_for_a_run_from_scratch(memory_store: MemoryStore) -> None:
    assert base_context(run_spec(), memory_store, "") is None
    with pytest.raises(NotFound):
        base_context(pretrained(Path("/nowhere")), memory_store, "0" * 16)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"vocab_size": 300}, {}, f"gives {NUM_TOKENS} ids, but the model's embedding has 300 rows"),
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


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "llama", "hidden_size": 32}, 512),
        ({"model_type": "llama", **TINY}, TINY["max_position_embeddings"]),
        ({"model_type": "mamba", "hidden_size": 32}, None),  # it counts none
    ],
)
def test_the_positions_of_a_model_from_scratch(fields: dict[str, Any], positions: int | None) -> None:
    spec = run_spec(model={"architecture": fields})
    check_task(spec)
    config = task_of(spec, dataset_manifest()).model_config()
    assert getattr(config, "max_position_embeddings", None) == positions
    assert config.hidden_size == 32


# -- docs/tasks.md


def test_the_pages_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "page_of_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    context = TaskContext(
        architecture={"model_type": "llama", **TINY}, vocab_size=NUM_TOKENS, end_of_text_id=0, sequence_length=16
    )
    own, plain = (load_task(name, context) for name in ("page_of_tasks:Smoothed", "causal-lm"))
    tokens = np.random.default_rng(1).integers(0, NUM_TOKENS, (2, 17))
    batch = own.collate(Samples(rows={"tokens": tokens}, num_real=2, row_rng=np.random.default_rng))
    torch.manual_seed(0)
    model = own.build_model().eval()
    with torch.no_grad():
        loss, smoothed = float(plain.loss_sum(model, batch)), float(own.loss_sum(model, batch))
        logits = model(input_ids=batch["input_ids"]).logits.float().log_softmax(-1)
        assert own.eval_sums(model, batch) == {"loss": pytest.approx(loss)}
    assert smoothed == pytest.approx(0.9 * loss - 0.1 * float(logits.mean(-1).sum()), rel=1e-5)


def test_the_page_has_every_part_of_a_task() -> None:
    table = PAGE.split("These are the parts:")[1].split("The gradient is")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    parts = {name: row[2].strip() for row in rows for name in re.findall(r"`(\w+)(?:\(|`)", row[1])}
    assert {name for name, given in parts.items() if given == "yes"} == Task.__abstractmethods__
    inner = {"build_model", "model_class_name", "remote_code", "save_config", "save_tokenizer"}
    assert set(parts) == {name for name in vars(Task) if not name.startswith("_")} - inner
    # What the page says of the context:
    fields = PAGE.split("`self.context` has")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", fields)) == set(TaskContext.__dataclass_fields__)


@pytest.mark.parametrize("name", ["causal-lm", "sequence-classification"])
def test_the_page_has_the_figures_of_a_task(name: str) -> None:
    (line,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
    task = load_task(
        name, TaskContext(architecture=None, vocab_size=2, end_of_text_id=0, sequence_length=1, classes=("a", "b"))
    )
    sums = dict.fromkeys(
        ["loss", "correct", *(f"{what}.{number}" for what in ("tp", "fp", "fn") for number in "01")], 0.0
    )
    split = Split(shards=(), num_tokens=1, num_bytes=1, num_files=1)
    assert set(re.findall(r"`(\w+)`", line.split("|")[4])) == set(task.metrics(sums, num_targets=1, split=split))
