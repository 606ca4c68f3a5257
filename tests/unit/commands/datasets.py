"""Small datasets, whole, for tests of the commands that look at them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest, Lineage, PartFile, Shard, Split, Tokenizer, TokenizerFile
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

NAME, FINGERPRINT = "text", "0123456789abcdef"
REFERENCE = f"{NAME}@{FINGERPRINT}"
PIECE_BYTES = 64


def put_dataset(store: MemoryStore, name: str = NAME, fingerprint: str = FINGERPRINT, **fields: Any) -> DatasetManifest:
    """Two training shards of 200 bytes in pieces of 64, one held-out shard, a tokenizer of two files, one part file."""
    prefix = layout.dataset(name, fingerprint)
    files = {"tokenizer.json": b"{}" * 50, "chat_template.jinja": b"{{ messages }}"}
    splits = {}
    for split, numbers in {"train": range(2), "eval": range(1)}.items():
        shards = []
        for number in numbers:
            entries = np.arange(100, dtype=np.uint16) + number
            shard, data = Shard.of(f"{split}-{number:05d}.bin", entries, piece_bytes=PIECE_BYTES)
            store.create(prefix + shard.file, data)
            shards.append(shard)
        num_tokens = sum(shard.num_tokens for shard in shards)
        splits[split] = Split(shards=tuple(shards), num_tokens=num_tokens, num_bytes=300, num_files=1)
    for file, data in files.items():
        store.create(prefix + file, data)
    part = b'{"slices": []}'
    store.create(prefix + "parts/00000.json", part)
    known = {
        file: TokenizerFile(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        for file, data in files.items()
    }
    main = known.pop("tokenizer.json")
    given: dict[str, Any] = {
        "name": name,
        "fingerprint": fingerprint,
        "dtype": "uint16",
        "piece_bytes": PIECE_BYTES,
        "tokenizer": Tokenizer(
            file="tokenizer.json", **main.model_dump(), vocab_size=300, end_of_text_id=0, files=known
        ),
        "unigram_loss": 5.0,
        "source": {
            "pattern": "s3://corpus/**",
            "num_files": 4,
            "num_bytes": 900,
            "num_skipped": 0,
            "num_records": 9,
            "num_bad_records": 0,
        },
        "created_s": 1_000_000_000.0,
        "lineage": Lineage(
            code_version="0.1.0",
            settings="0" * 64,
            parts=(
                PartFile(
                    file="parts/00000.json",
                    sha256=hashlib.sha256(part).hexdigest(),
                    size_bytes=len(part),
                    key="1" * 64,
                ),
            ),
        ),
        **splits,
    }
    manifest = DatasetManifest.model_validate({**given, **fields})
    store.create_json(layout.dataset_manifest(name, fingerprint), manifest.model_dump(mode="json"))
    return manifest
