"""Conversations to packed rows: the chat template, the mask of targets, what is too long, and packing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.dataset.packing import pack
from orchestrator.dataset.rows import U32, conversation_entries, num_targets, packed_row, target_ids
from orchestrator.dataset.source import SourceFile
from orchestrator.dataset.tokenizer import fetch_tokenizer_files
from orchestrator.spec import canonical_json
from orchestrator.store import Store
from workloads.prepare.chat import ChatTemplate, Rendered, target_mask
from workloads.prepare.documents import job_records
from workloads.prepare.parts import (
    SPLITS,
    Part,
    PartJob,
    SplitName,
    SplitPart,
    Tally,
    batched,
    frequencies,
    upload_shard,
)
from workloads.prepare.records import Unusable, conversation_of
from workloads.prepare.vocabulary import load_tokenizer, whole

FIELDS = ["messages", "prompt", "completion"]
_BATCH = 256  # conversations tokenized at once


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A conversation that is to be tokenized."""

    file: SourceFile
    line: int
    split: SplitName
    rendered: Rendered


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A conversation as it goes into a row."""

    entries: U32
    target_bytes: int
    """Of the text that the targets hold."""


def messages_part(job: PartJob, store: Store) -> Part:
    """One part of the source as one shard of rows per split."""
    with tempfile.TemporaryDirectory(prefix="headway-tokenizer-") as folder:
        tokenizer = load_tokenizer(fetch_tokenizer_files(store, job.prefix, job.tokenizer, Path(folder)))
    backend = whole(tokenizer.backend_tokenizer)
    tally = Tally()
    kept: dict[SplitName, list[Encoded]] = {split: [] for split in SPLITS}
    files: dict[SplitName, dict[str, None]] = {split: {} for split in SPLITS}
    for batch in batched(_conversations(job, store, ChatTemplate(tokenizer), tally), _BATCH):
        encodings = backend.encode_batch([one.rendered.text for one in batch], add_special_tokens=False)
        for one, encoding in zip(batch, encodings, strict=True):
            encoded = _fit(job, one, encoding, tally)
            if encoded is not None:
                kept[one.split].append(encoded)
                files[one.split][one.file.path] = None
    splits = {split: _split_part(job, store, split, kept[split], tuple(files[split]), tally) for split in SPLITS}
    return tally.part(splits)


def encode(rendered: Rendered, encoding: Any, *, row_tokens: int) -> Encoded:
    """A tokenized conversation, cut to ``row_tokens``."""
    offsets = encoding.offsets[:row_tokens]
    mask = target_mask(offsets, rendered.spans)
    last = offsets[-1][1] if offsets else 0
    said = (rendered.text[start : min(end, last)] for start, end in rendered.spans)
    return Encoded(
        entries=conversation_entries(encoding.ids[:row_tokens], mask),
        target_bytes=sum(len(text.encode()) for text in said),
    )


def _conversations(job: PartJob, store: Store, template: ChatTemplate, tally: Tally) -> Iterator[_Waiting]:
    """The part's conversations, rendered, in their order; what gives none is counted."""
    for file, line, record in job_records(job, store, tally, FIELDS):
        split: SplitName | None = None
        try:
            conversation = conversation_of(record)
            split = job.split_of(file, canonical_json(conversation).decode())
            rendered = template.render(conversation)
        except Unusable as e:
            tally.skip(file, line, e.reason, split=split)
        else:
            yield _Waiting(file=file, line=line, split=split, rendered=rendered)


def _fit(job: PartJob, one: _Waiting, encoding: Any, tally: Tally) -> Encoded | None:
    """The conversation as it fits a row, or None where it is left out."""
    row_tokens = job.data.sequence_length + 1
    is_long = len(encoding.ids) > row_tokens
    if is_long and job.data.long_samples == "skip":
        tally.skip(one.file, one.line, "too_long", split=one.split, bad=False)
        return None
    encoded = encode(one.rendered, encoding, row_tokens=row_tokens)
    found = num_targets(encoded.entries)
    if not found:
        tally.skip(one.file, one.line, "no_target_left", split=one.split, bad=not is_long)
        return None
    tally.counts[f"{one.split}.samples"] += 1
    tally.counts[f"{one.split}.truncated"] += is_long
    tally.counts[f"{one.split}.target_tokens"] += found
    return encoded


def _split_part(
    job: PartJob,
    store: Store,
    split: SplitName,
    kept: list[Encoded],
    files: tuple[str, ...],
    tally: Tally,
) -> SplitPart:
    row_tokens = job.data.sequence_length + 1
    lengths = [len(one.entries) for one in kept]
    rows = [
        packed_row([kept[item].entries for item in row], row_tokens=row_tokens, pad_id=job.tokenizer.pad_id)
        for row in pack(lengths, row_tokens)
    ]
    flat = np.concatenate(rows) if rows else np.empty(0, dtype=np.uint32)
    tally.counts[f"{split}.padding_tokens"] += len(flat) - sum(lengths)
    targets = target_ids(flat)
    return SplitPart(
        shard=upload_shard(store, job.prefix, f"{split}-{job.number:05d}.bin", flat),
        num_bytes=sum(one.target_bytes for one in kept),
        num_targets=len(targets),
        files=files,
        frequencies=frequencies(targets),
    )
