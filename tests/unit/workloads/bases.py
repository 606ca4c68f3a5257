"""Pretrained models for tests of tasks: tiny random ones, fetched into a store in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from orchestrator.dataset.format import DatasetManifest, Split, Tokenizer, TokenizerFile
from orchestrator.pretrained.source import list_base
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Store
from tests.tiny_model import END_OF_TEXT, make_tokenizer
from workloads.fetch_base import fetch_base
from workloads.tasks.base_context import BaseContext, base_context

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def run_spec(**changes: Any) -> RunSpec:
    document = {
        "apiVersion": "headway/v1",
        "name": "tiny",
        "model": {"architecture": {"model_type": "llama", **TINY}},
        "data": {"train": "data/*.jsonl", "sequence_length": 16},
        "train": {"steps": 1},
        **changes,
    }
    return parse(document)


def save_base(directory: Path, *, model_type: str = "llama", vocab_size: int | None = None, **fields: Any) -> Path:
    """A Hugging Face directory of a model without a head for classes, with a chat template."""
    tokenizer = make_tokenizer()
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=vocab_size or tokenizer.get_vocab_size(), **{**TINY, **fields}
    )
    auto = transformers.AutoModelForMaskedLM if model_type == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(directory)
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return directory


def fetched(store: Store, directory: Path, spec: RunSpec) -> BaseContext:
    """The base in the store, and its small files in the node's cache."""
    manifest = fetch_base(list_base(str(directory), store), store)
    found = base_context(spec, store, manifest.fingerprint)
    assert found is not None
    return found


def dataset_manifest(**changes: Any) -> DatasetManifest:
    split = Split(shards=(), num_tokens=0, num_bytes=100, num_files=1)
    digest = TokenizerFile(sha256="0" * 64, size_bytes=1)
    tokenizer = Tokenizer(
        file="tokenizer.json",
        vocab_size=make_tokenizer().get_vocab_size(),
        end_of_text_id=0,
        files={"tokenizer_config.json": digest} if changes.pop("whole_tokenizer", False) else {},
        **digest.model_dump(),
    )
    kind = changes.get("kind", "stream")
    rows = {} if kind == "stream" else {"row_tokens": 17}
    document = {
        "name": "tiny",
        "fingerprint": "0123456789abcdef",
        "dtype": "uint32",
        "tokenizer": tokenizer,
        "train": split,
        "eval": split,
        "unigram_loss": 1.0,
        "source": {},
        "created_s": 0.0,
        **rows,
        **changes,
    }
    return DatasetManifest.model_validate(document)
