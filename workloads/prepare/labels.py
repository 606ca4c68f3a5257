"""Labelled texts to rows: the classes that there are, and each text with its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from orchestrator.dataset.rows import labelled_row
from orchestrator.dataset.source import SourceFile
from orchestrator.errors import RunError
from orchestrator.store import Store
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
    part_of,
    upload_shard,
)
from workloads.prepare.records import LabelledText, Unusable, labelled_of
from workloads.prepare.vocabulary import load_backend

MAX_CLASSES = 1000
_BATCH = 1024  # texts tokenized at once
_NAMED = 5  # classes that an error names

Sample = tuple[SourceFile, int, LabelledText]
"""File, line, and what stands there."""


class Classes(BaseModel):
    """The classes seen in a part, or in all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    counts: dict[SplitName, dict[str, int]]
    """Texts of each class, by split."""
    all_numbers: bool


def scan_part(job: PartJob, store: Store) -> Classes:
    """Which classes one part of the source holds. It stops where there are too many to go on with."""
    counts: dict[SplitName, Counter[str]] = {split: Counter() for split in SPLITS}
    all_numbers = True
    for file, _, found in _texts(job, store, Tally()):
        counts[job.split_of(file, found.text)][found.label] += 1
        all_numbers = all_numbers and found.is_number
        if len(counts["train"]) > MAX_CLASSES:
            break
    return Classes(counts={split: dict(counter) for split, counter in counts.items()}, all_numbers=all_numbers)


def class_names(scanned: Sequence[Classes], label_field: str) -> tuple[str, ...]:
    """The classes in their order: that of numbers where all are whole numbers, else that of texts.

    Raises:
        RunError: one class alone, too many, or one that training never sees.
    """
    counts: dict[SplitName, Counter[str]] = {split: Counter() for split in SPLITS}
    for part in scanned:
        for split in SPLITS:
            counts[split].update(part.counts[split])
    names = sorted(counts["train"], key=int if all(part.all_numbers for part in scanned) else str)
    field = f"data.label_field {label_field!r}"
    if len(names) > MAX_CLASSES:
        raise RunError(
            f"{field} holds more than {MAX_CLASSES} classes, such as {_some(names)}.",
            next_step="Name the field of the class; a number that is measured is none.",
        )
    if len(names) < 2:
        raise RunError(
            f"{field} holds {f'one class alone, {names[0]!r}' if names else 'no class'} in the training split; "
            "at least two are needed.",
            next_step="Use data of several classes, or name another field.",
        )
    unseen = sorted(counts["eval"].keys() - counts["train"].keys())
    if unseen:
        raise RunError(
            f"{field} holds classes in the held-out split that the training split lacks: {_some(unseen)}.",
            next_step="Use more data of them, leave them out, or set another data.eval_fraction.",
        )
    return tuple(names)


def labels_part(job: PartJob, store: Store) -> Part:
    """One part of the source as one shard of rows per split."""
    content = store.get_verified(
        job.prefix + job.tokenizer.file, sha256=job.tokenizer.sha256, size_bytes=job.tokenizer.size_bytes
    )
    backend = load_backend(content)  # one of its own, since it is told to cut
    backend.enable_truncation(max_length=job.data.sequence_length)
    tally = Tally()
    rows: dict[SplitName, list[Any]] = {split: [] for split in SPLITS}
    num_bytes: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    files: dict[SplitName, dict[str, None]] = {split: {} for split in SPLITS}
    numbers = {name: number for number, name in enumerate(job.classes)}
    for batch in batched(_texts(job, store, tally), _BATCH):
        encodings = backend.encode_batch([found.text for _, _, found in batch])
        for (file, line, found), encoding in zip(batch, encodings, strict=True):
            split = job.split_of(file, found.text)
            if not _is_kept(job, file, line, split, encoding, tally):
                continue
            rows[split].append(_row(job, numbers[found.label], encoding.ids))
            num_bytes[split] += len(found.text.encode())
            files[split][file.path] = None
            tally.counts[f"{split}.padding_tokens"] += job.data.sequence_length - len(encoding.ids)
    splits = {
        split: _split_part(job, store, split, rows[split], num_bytes[split], tuple(files[split])) for split in SPLITS
    }
    return part_of(job, splits, tally)


def _texts(job: PartJob, store: Store, tally: Tally) -> Iterator[Sample]:
    """The part's labelled texts in their order; what is none is counted."""
    for file, line, record in job_records(job, store, tally, [job.data.text_field, job.data.label_field or ""]):
        try:
            found = labelled_of(record, job.data)
        except Unusable as e:
            tally.skip(file, line, e)
        else:
            yield file, line, found


def _is_kept(job: PartJob, file: SourceFile, line: int, split: SplitName, encoding: Any, tally: Tally) -> bool:
    is_long = bool(encoding.overflowing)
    if is_long and job.data.long_samples == "skip":
        tally.skip(file, line, Unusable("too_long"), split=split, bad=False)
        return False
    if not encoding.ids:
        tally.skip(file, line, Unusable("no_text"), split=split)
        return False
    tally.counts[f"{split}.samples"] += 1
    tally.counts[f"{split}.truncated"] += is_long
    return True


def _row(job: PartJob, label: int, token_ids: list[int]) -> Any:
    pad_id = job.tokenizer.pad_id
    return labelled_row(label, token_ids, row_tokens=job.data.sequence_length + 1, pad_id=pad_id)


def _split_part(
    job: PartJob, store: Store, split: SplitName, rows: list[Any], num_bytes: int, files: tuple[str, ...]
) -> SplitPart:
    labels = np.array([row[0] for row in rows], dtype=np.int64)
    flat = np.concatenate(rows) if rows else np.empty(0, dtype=np.uint32)
    return SplitPart(
        shard=upload_shard(store, job, split, flat),
        num_bytes=num_bytes,
        num_targets=len(rows),
        files=files,
        frequencies=frequencies(labels),
    )


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more
