"""A tiny random Llama with a byte-level BPE, made on the fly, and a version of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orchestrator.release.versions import (
    CheckpointSource,
    DatasetSource,
    Version,
    VersionFile,
    claim_version,
    publish,
)
from orchestrator.store import Store, layout

CONTEXT_TOKENS = 128
END_OF_TEXT = "<|endoftext|>"
TEXTS = ["def __init__(self, name):\n    self.name = name\n", "naïve café — 漢字かな 🙂👩‍👩‍👧 ∑x² и кириллица\n"]


def make_tokenizer(vocab_size: int = 384, texts: Sequence[str] = TEXTS) -> tokenizers.Tokenizer:
    """With few merges most characters outside ASCII are spread over several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 20, trainer)
    return tokenizer


def save_model(directory: Path, *, seed: int, with_end: bool = False) -> Path:
    """A Hugging Face directory. Without an end token it generates until the limit."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT) if with_end else None,
        pad_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(directory)
    return directory


def release_version(store: Store, model: str, directory: Path, *, task: str = "causal-lm") -> Version:
    """Publish a directory as the next version, the way that the pipeline does."""
    number = claim_version(store, model, facts={"run_id": "tiny-00000000", "attempt": 1})
    files = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        store.upload(layout.version(model, number) + path.name, path)
        files[path.name] = VersionFile(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    version = make_version(model=model, number=number, files=files, task=task)
    publish(store, version)
    return version


def make_version(
    *, model: str = "code-lm", number: int = 1, files: dict[str, VersionFile], task: str = "causal-lm"
) -> Version:
    return Version(
        model=model,
        number=number,
        task=task,
        run_id="tiny-00000000",
        attempt=1,
        checkpoint=CheckpointSource(uri="s3://bucket/runs/tiny-00000000/checkpoints/step-00000100", step=100),
        dataset=DatasetSource(name="stdlib", fingerprint="0123456789abcdef"),
        code_digest="",
        evaluation={"loss": 3.0, "perplexity": 20.1, "bits_per_byte": 1.9},
        gate={"passed": True, "reasons": []},
        files=files,
        created_s=time.time(),
        nonce="00000000",
    )
