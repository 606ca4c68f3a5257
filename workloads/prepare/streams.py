"""Text as one stream of tokens: documents one after the other, an end-of-text mark behind each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.source import Slice
from orchestrator.store import Store
from workloads.prepare.documents import NotInFormat, texts
from workloads.prepare.parts import (
    SPLITS,
    Extent,
    Part,
    PartJob,
    SliceDone,
    SplitName,
    SplitPart,
    Tally,
    frequencies,
    part_of,
    slice_done,
    stream_dtype,
    upload_shard,
)
from workloads.prepare.reuse import EarlierSlices, SliceTokens
from workloads.prepare.vocabulary import backend_of

_BATCH_CHARS, _BATCH_DOCUMENTS = 2**20, 1024  # tokenized at once


def stream_part(job: PartJob, store: Store) -> tuple[Part, int]:
    """One part of the source as one shard per split, and how many slices were taken from an earlier preparation."""
    tokens: dict[SplitName, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
    slices, tally, num_reused = [], Tally(), 0
    filled: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    for found, is_reused in _all_tokens(job, store):
        done = _placed(found.done, filled)
        for split, entries in found.tokens.items():
            tokens[split].append(entries)
            filled[split] += len(entries)
        tally.add(done)
        slices.append(done)
        num_reused += is_reused
    splits = {split: _split_part(job, store, split, tokens.pop(split), slices) for split in SPLITS}
    return part_of(job, splits, tally, slices), num_reused


def _all_tokens(job: PartJob, store: Store) -> Iterator[tuple[SliceTokens, bool]]:
    """What each slice gives, in order, and whether it was taken from an earlier preparation."""
    earlier = EarlierSlices(job, store)
    fresh = _tokenized(job, [piece for piece in job.slices if piece not in earlier], store)
    for piece in job.slices:
        if piece not in earlier:
            yield next(fresh), False
            continue
        found = earlier.take(piece)
        yield (found, True) if found is not None else (next(_tokenized(job, [piece], store)), False)


def _tokenized(job: PartJob, slices: Iterable[Slice], store: Store) -> Iterator[SliceTokens]:
    """What each slice gives once it is read."""
    for piece, tally, documents in texts(job.data, slices, store):
        yield _tokenize(job, piece, tally, documents, backend_of(job.tokenizer, job.prefix, store))


def _tokenize(job: PartJob, piece: Slice, tally: Tally, documents: Iterator[str], backend: Any) -> SliceTokens:
    tokens: dict[SplitName, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
    num_bytes: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    try:
        for batch in _batches(documents):
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)  # which finds no offsets
            for text, encoding in zip(batch, encodings, strict=True):
                split = job.split_of(piece.file, text)
                tokens[split].append(_entries(encoding.ids, job))
                num_bytes[split] += len(text.encode())
    except NotInFormat as e:  # what came before is left out with the rest
        refused = Tally()
        refused.skip_file(piece.file, str(e))
        return SliceTokens(tokens={}, done=slice_done(piece, {}, refused))
    joined = {split: np.concatenate(found) for split, found in tokens.items() if found}
    extents = {
        split: Extent(start=0, num_tokens=len(entries), num_bytes=num_bytes[split], num_documents=len(tokens[split]))
        for split, entries in joined.items()
    }
    return SliceTokens(tokens=joined, done=slice_done(piece, extents, tally))


def _entries(ids: list[int], job: PartJob) -> npt.NDArray[Any]:
    """A document's tokens and the mark behind it."""
    entries = np.empty(len(ids) + 1, dtype=stream_dtype(job.tokenizer.vocab_size))
    entries[:-1] = ids
    entries[-1] = job.tokenizer.end_of_text_id
    return entries


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _placed(done: SliceDone, filled: dict[SplitName, int]) -> SliceDone:
    """With the places that its tokens get behind as many that are there."""
    extents = {split: extent.model_copy(update={"start": filled[split]}) for split, extent in done.splits.items()}
    return done.model_copy(update={"splits": extents})


def _split_part(
    job: PartJob, store: Store, split: SplitName, tokens: list[npt.NDArray[Any]], slices: list[SliceDone]
) -> SplitPart:
    flat = np.concatenate(tokens) if tokens else np.empty(0, dtype=stream_dtype(job.tokenizer.vocab_size))
    mine = [(done.path, done.splits[split]) for done in slices if split in done.splits]
    return SplitPart(
        shard=upload_shard(store, job, split, flat),
        num_bytes=sum(extent.num_bytes for _, extent in mine),
        num_targets=None,
        files=tuple(dict.fromkeys(path for path, _ in mine)),
        frequencies=frequencies(flat),
    )
