"""What ``headway plan`` knows of runs that start from a pretrained model, and what it says where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.plan import _num_samples, plan, size_of
from orchestrator.errors import SpecError
from orchestrator.runs import identify
from orchestrator.spec import RunSpec, parse
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}
NUM_LLAMA = 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
HUB = f"hf://org/name@{'0' * 40}"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run_spec(pretrained: str | Path, **changes: Any) -> RunSpec:
    """One part of the run file may be replaced by each of ``changes``; those of ``model`` stand beside pretrained."""
    document: dict[str, Any] = {
        "apiVersion": "headway/v1",
        "name": "tuned",
        "data": {"train": "data/*.jsonl", "format": "messages", "sequence_length": 16},
        "train": {"steps": 3},
        **changes,
        "model": {"pretrained": str(pretrained), **changes.get("model", {})},
    }
    return parse(document)


def save_config(folder: Path, config: dict[str, Any]) -> Path:
    """All that plan reads of a pretrained model; there are no weights."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_local_model_is_counted_without_a_store_or_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    size = size_of(run_spec(save_config(tmp_path, LLAMA)), None).size
    assert size is not None
    assert (size.num_parameters, size.num_trainable) == (NUM_LLAMA, NUM_LLAMA)


def test_of_an_adapters_run_most_is_frozen(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    size = size_of(run_spec(save_config(tmp_path, LLAMA), model={"lora": lora}), None).size
    assert size is not None
    assert (size.num_parameters - size.num_trainable, size.num_trainable) == (NUM_LLAMA, 2 * 2 * 2 * (32 + 32))


def test_a_classifier_is_counted_with_its_head(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    data = {"train": "data/*.jsonl", "format": "jsonl", "label_field": "kind", "sequence_length": 16}
    spec = run_spec(save_config(tmp_path, bert), task="sequence-classification", data=data)
    size = size_of(spec, None).size
    assert size is not None
    assert (size.hidden_size, size.vocab_size) == (32, None)  # no logits over the vocabulary


def test_a_model_in_s3_is_counted_from_its_config() -> None:
    pytest.importorskip("transformers")
    store = MemoryStore()
    store.at("models").create("llama/config.json", json.dumps(LLAMA).encode())
    size = size_of(run_spec("s3://models/llama"), store).size
    assert size is not None
    assert size.num_parameters == NUM_LLAMA


@pytest.mark.parametrize(
    ("pretrained", "has_store", "said"),
    [
        (HUB, True, f"{HUB} was not fetched into the store yet, which the run does first"),
        (HUB, False, "no store is set"),
        ("s3://models/llama", False, "no store is set"),
        ("s3://models/llama", True, "config.json of s3://models/llama cannot be read"),
        ("/nowhere/at/all", False, "config.json of /nowhere/at/all cannot be read"),
        ("/nowhere/at/all.gguf", True, "cannot be read: model.pretrained: "),
    ],
)
def test_what_cannot_be_told_is_said_with_the_reason(pretrained: str, has_store: bool, said: str) -> None:
    sizing = size_of(run_spec(pretrained), MemoryStore() if has_store else None)
    assert sizing.size is None
    assert said in sizing.reason


def test_a_gguf_file_is_known_once_it_was_fetched(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF, which is not read")
    sizing = size_of(run_spec(file), MemoryStore())
    assert sizing.size is None
    assert sizing.reason == f"{file} was not fetched into the store yet, which the run does first"


def test_code_beside_the_weights_is_not_run_to_count_them(tmp_path: Path) -> None:
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    spec = run_spec(save_config(tmp_path, config), model={"trust_remote_code": True})
    assert size_of(spec, None).reason == "the pretrained model brings its own code, which plan does not run"


def test_an_adapter_for_other_modules_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    spec = run_spec(save_config(tmp_path, LLAMA), model={"lora": {"target_modules": ["c_attn"]}})
    with pytest.raises(SpecError, match=r"model\.lora is refused"):
        size_of(spec, None)


def test_steps_of_epochs_are_known_once_the_data_is_prepared(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    model = save_config(tmp_path, LLAMA)
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    data = {"train": str(tmp_path / "talk.jsonl"), "format": "messages", "sequence_length": 16}
    spec = run_spec(model, data=data, train={"epochs": 2})
    identity = identify(spec, store, tmp_path)
    assert _num_samples(spec, store, identity) is None
    prefix = layout.dataset_manifest(spec.name, identity.dataset_fingerprint)
    store.create_json(prefix, prepared(identity.dataset_fingerprint, num_rows=40))
    assert _num_samples(spec, store, identity) == 40


def prepared(fingerprint: str, *, num_rows: int) -> dict[str, Any]:
    shard = {"file": "0", "num_tokens": 17 * num_rows, "size_bytes": 4 * 17 * num_rows, "pieces": ["0" * 64]}
    split = {"shards": [shard], "num_tokens": 17 * num_rows, "num_bytes": 1, "num_files": 1}
    tokenizer = {"file": "tokenizer.json", "sha256": "0" * 64, "size_bytes": 1, "vocab_size": 300, "end_of_text_id": 0}
    return {
        "format": "headway/dataset/2",
        "name": "tuned",
        "fingerprint": fingerprint,
        "dtype": "uint32",
        "kind": "packed",
        "row_tokens": 17,
        "tokenizer": tokenizer,
        "train": split,
        "eval": split,
        "unigram_loss": 1.0,
        "source": {},
        "created_s": 0.0,
    }


def test_the_lines_say_what_the_run_file_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people read them, on this machine, where no store is set."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADWAY_STORE", raising=False)
    save_config(tmp_path, LLAMA)
    (tmp_path / "run.yaml").write_text(
        f"""
        apiVersion: headway/v1
        name: tuned
        model: {{pretrained: {tmp_path}, lora: {{rank: 2, target_modules: [q_proj]}}}}
        data: {{train: "data/*.jsonl", format: messages, sequence_length: 16}}
        train:
          epochs: 2
          activation_checkpointing: true
          deepspeed: {{communication_data_type: fp32, zero_optimization: {{reduce_bucket_size: 1000}}}}
        """
    )
    facts, text = plan(tmp_path / "run.yaml", target="local", store_uri=None, manifests=False)
    rows = dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))
    said = {label: value.strip() for label, value in rows.items()}
    assert said["run"].startswith("its id follows from the data; no store is set")
    assert said["steps"] == "unknown until the data is prepared"
    assert said["activations"] == "computed again in the backward pass"
    assert said["DeepSpeed"] == 'communication_data_type "fp32", zero_optimization.reduce_bucket_size 1000'
    trained = 2 * 2 * (32 + 32)
    assert said["parameters"] == f"{NUM_LLAMA + trained:,}, of which {trained:,} are trained"
    assert facts["size"]["num_trainable"] == trained
    assert facts["deepspeed"]["zero_optimization"] == {"reduce_bucket_size": 1000}
