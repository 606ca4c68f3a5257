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
from workloads.prepare.literals import Tokens, without_marks
from workloads.prepare.parts import (
    SPLITS,
    Part,
    PartJob,
    SplitName,
    SplitPart,
    Tally,
    batched,
    frequencies,
    part_of,
    upload_shard,
)
from workloads.prepare.records import Unusable, conversation_of
from workloads.prepare.vocabulary import load_tokenizer, whole

FIELDS = ["messages", "prompt", "completion", "tools"]
_BATCH = 256  # conversations tokenized at once
_loaded: dict[str, ChatTemplate] = {}
"""The newest in this process, by the digests of its files."""


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A conversation, or its beginning, that is to be tokenized."""

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
    template = _template(job, store)
    tally = Tally()
    kept: dict[SplitName, list[Encoded]] = {split: [] for split in SPLITS}
    files: dict[SplitName, dict[str, None]] = {split: {} for split in SPLITS}
    for batch in batched(_conversations(job, store, template, tally), _BATCH):
        all_tokens = template.literals.encode_batch([one.rendered.text for one in batch])
        for one, tokens in zip(batch, all_tokens, strict=True):
            encoded = _fit(job, one, tokens, tally)
            if encoded is not None:
                kept[one.split].append(encoded)
                files[one.split][one.file.path] = None
    splits = {split: _split_part(job, store, split, kept[split], tuple(files[split]), tally) for split in SPLITS}
    return part_of(job, splits, tally)


def _template(job: PartJob, store: Store) -> ChatTemplate:
    """The chat template with its tokenizer, loaded once a process: it takes longer than some small parts do."""
    files = job.tokenizer.model_dump_json()  # which holds their digests
    if files not in _loaded:
        with tempfile.TemporaryDirectory(prefix="headway-tokenizer-") as folder:
            tokenizer = load_tokenizer(fetch_tokenizer_files(store, job.prefix, job.tokenizer, Path(folder)))
        whole(tokenizer.backend_tokenizer)
        _loaded.clear()
        _loaded[files] = ChatTemplate(tokenizer)
    return _loaded[files]


def encode(rendered: Rendered, tokens: Any, *, row_tokens: int) -> Encoded:
    """A conversation cut to ``row_tokens``.

    Args:
        tokens: of its text; a ``tokenizers.Encoding``, or :class:`~workloads.prepare.literals.Tokens`.
    """
    offsets = tokens.offsets[:row_tokens]
    mask = target_mask(offsets, rendered.spans)
    last = offsets[-1][1] if offsets else 0
    said = (rendered.text[start : min(end, last)] for start, end in rendered.spans)
    return Encoded(
        entries=conversation_entries(tokens.ids[:row_tokens], mask),
        target_bytes=sum(len(without_marks(text).encode()) for text in said),
    )


def _conversations(job: PartJob, store: Store, template: ChatTemplate, tally: Tally) -> Iterator[_Waiting]:
    """The part's conversations, rendered, in their order; what gives none is counted."""
    for file, line, record in job_records(job, store, tally, FIELDS):
        split: SplitName | None = None
        try:
            conversation = conversation_of(record)
            split = job.split_of(file, canonical_json(conversation).decode())
            samples = template.samples(conversation)
        except Unusable as e:
            tally.skip(file, line, e, split=split)
            continue
        tally.counts[f"{split}.divided"] += len(samples) > 1
        for rendered in samples:
            yield _Waiting(file=file, line=line, split=split, rendered=rendered)


def _fit(job: PartJob, one: _Waiting, tokens: Tokens, tally: Tally) -> Encoded | None:
    """The conversation as it fits a row, or None where it is left out."""
    row_tokens = job.data.sequence_length + 1
    is_long = len(tokens.ids) > row_tokens
    if is_long and job.data.long_samples == "skip":
        tally.skip(one.file, one.line, Unusable("too_long"), split=one.split, bad=False)
        return None
    encoded = encode(one.rendered, tokens, row_tokens=row_tokens)
    found = num_targets(encoded.entries)
    if not found:
        tally.skip(one.file, one.line, Unusable("no_target_left"), split=one.split, bad=not is_long)
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
        shard=upload_shard(store, job, split, flat),
        num_bytes=sum(one.target_bytes for one in kept),
        num_targets=len(targets),
        files=files,
        frequencies=frequencies(targets),
    )
