"""Text as one stream of tokens: documents one after the other, an end-of-text mark behind each."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.store import Store
from workloads.prepare.documents import read_documents
from workloads.prepare.parts import SPLITS, Part, PartJob, SplitName, SplitPart, Tally, frequencies, upload_shard
from workloads.prepare.vocabulary import load_backend


def stream_part(job: PartJob, store: Store) -> Part:
    """One part of the source as one shard per split."""
    tokenizer = load_backend(store.get(job.prefix + job.tokenizer.file))
    dtype = stream_dtype(job.tokenizer.vocab_size)
    tokens: dict[SplitName, list[Any]] = {split: [] for split in SPLITS}
    num_bytes: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    files: dict[SplitName, list[str]] = {split: [] for split in SPLITS}
    tally = Tally()
    for file, documents in read_documents(job.data, [piece.file for piece in job.slices], store, bad=tally.skip_file):
        here = [job.split_of(file, text) for text in documents]
        for split in dict.fromkeys(here) if here else [job.split_of(file, "")]:
            files[split].append(file.path)
        encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
        for split, text, encoding in zip(here, documents, encodings, strict=True):
            tokens[split].append(np.asarray([*encoding.ids, job.tokenizer.end_of_text_id], dtype=dtype))
            num_bytes[split] += len(text.encode())
    splits: dict[SplitName, SplitPart] = {}
    for split in SPLITS:
        flat = np.concatenate(tokens[split]) if tokens[split] else np.empty(0, dtype=dtype)
        splits[split] = SplitPart(
            shard=upload_shard(store, job.prefix, f"{split}-{job.number:05d}.bin", flat),
            num_bytes=num_bytes[split],
            num_targets=None,
            files=tuple(files[split]),
            frequencies=frequencies(flat),
        )
    return tally.part(splits)


def stream_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
