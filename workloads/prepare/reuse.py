"""What an earlier preparation of the same dataset made of files that have not changed.

With equal settings and an equal tokenizer a slice of a source file gives equal tokens. So those of a stream are taken
slice by slice out of the earlier shards, and whole parts of rows, which hold conversations of several files. What is
taken is checked piece by piece against the digests that the earlier manifest, by its part files, records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from orchestrator.dataset.format import DatasetManifest, PartFile, Shard, Tokenizer, read_manifest
from orchestrator.dataset.source import Slice
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.store import Store, layout
from workloads.prepare.parts import (
    EarlierPart,
    Part,
    PartJob,
    SliceDone,
    SplitName,
    batched,
    slice_done,
    slice_key,
    stream_dtype,
    upload_shard,
)

_READS = 16

SliceKey = tuple[str, str, int, int, int]


def find_earlier(store: Store, name: str, *, settings: str, tokenizer: Tokenizer, but: str) -> DatasetManifest | None:
    """The newest other preparation of a dataset with these settings and this tokenizer.

    Args:
        but: the fingerprint of the one that is made.
    """

    def fits(fingerprint: str) -> DatasetManifest | None:
        try:
            manifest = read_manifest(store, name, fingerprint)
        except (NotFound, IntegrityError):  # not finished, or of another version of Headway
            return None
        is_alike = manifest.lineage is not None and manifest.lineage.settings == settings
        return manifest if is_alike and manifest.tokenizer == tokenizer else None

    others = [fingerprint for fingerprint in store.list_folders(layout.datasets(name)) if fingerprint != but]
    newest: DatasetManifest | None = None
    with ThreadPoolExecutor(_READS) as pool:
        for some in batched(others, _READS):  # of which not more are in memory
            found = [manifest for manifest in (newest, *pool.map(fits, some)) if manifest is not None]
            newest = max(found, key=lambda manifest: manifest.created_s, default=None)
    return newest


def with_earlier(jobs: list[PartJob], earlier: DatasetManifest, store: Store) -> list[PartJob]:
    """The jobs, each with the earlier parts that hold slices of its own."""
    prefix = layout.dataset(earlier.name, earlier.fingerprint)
    files = earlier.lineage.parts if earlier.lineage is not None else ()
    whole = {file.key: file for file in files}
    keys = {job.key for job in jobs}
    changed = [file for file in files if file.key not in keys]
    by_slice: dict[SliceKey, PartFile] = {}
    if earlier.kind == "stream":
        with ThreadPoolExecutor(_READS) as pool:
            for some in batched(changed, _READS):  # of which not more are in memory
                for file, part in zip(some, pool.map(lambda file: _read(store, prefix, file), some), strict=True):
                    by_slice.update((done.key, file) for done in (part.slices if part is not None else ()))
    return [_with_parts(job, _parts_for(job, whole, by_slice), prefix, earlier.piece_bytes) for job in jobs]


def _parts_for(job: PartJob, whole: dict[str, PartFile], by_slice: dict[SliceKey, PartFile]) -> list[PartFile]:
    if job.key in whole:
        return [whole[job.key]]
    found = (by_slice.get(slice_key(piece)) for piece in job.slices)
    return list({file.file: file for file in found if file is not None}.values())


def _with_parts(job: PartJob, files: Iterable[PartFile], prefix: str, piece_bytes: int) -> PartJob:
    parts = tuple(EarlierPart(prefix=prefix, piece_bytes=piece_bytes, file=file) for file in files)
    return job.model_copy(update={"earlier": parts})


def _read(store: Store, prefix: str, file: PartFile) -> Part | None:
    """An earlier part; None where it is damaged, gone or of another version of Headway, and is made anew."""
    try:
        content = store.get_verified(prefix + file.file, sha256=file.sha256, size_bytes=file.size_bytes)
        return Part.model_validate_json(content)
    except (NotFound, IntegrityError, ValidationError):
        return None


@dataclass(frozen=True, kw_only=True)
class SliceTokens:
    """What a slice gives to a stream."""

    tokens: dict[SplitName, npt.NDArray[Any]]
    done: SliceDone


class EarlierSlices:
    """The slices of a job that an earlier preparation has tokenized."""

    def __init__(self, job: PartJob, store: Store) -> None:
        self._shards: dict[SliceKey, tuple[SliceDone, dict[SplitName, _EarlierShard]]] = {}
        dtype = np.dtype(stream_dtype(job.tokenizer.vocab_size)).newbyteorder("<")
        for earlier in job.earlier:
            part = _read(store, earlier.prefix, earlier.file)
            if part is None:
                continue
            shards = {
                split: _EarlierShard(store, earlier, found.shard, dtype)
                for split, found in part.splits.items()
                if found.shard is not None
            }
            self._shards.update((done.key, (done, shards)) for done in part.slices)

    def __contains__(self, piece: Slice) -> bool:
        return slice_key(piece) in self._shards

    def take(self, piece: Slice) -> SliceTokens | None:
        """The slice's tokens, checked; None where they are damaged or gone."""
        done, shards = self._shards[slice_key(piece)]
        try:
            tokens = {
                split: shards[split].read(extent.start, extent.num_tokens) for split, extent in done.splits.items()
            }
        except (NotFound, IntegrityError):
            return None
        here = slice_done(piece)
        return SliceTokens(tokens=tokens, done=done.model_copy(update={"uri": here.uri}))


class _EarlierShard:
    """A shard of which ranges are read in order, each piece of it once and checked."""

    def __init__(self, store: Store, part: EarlierPart, shard: Shard, dtype: np.dtype[Any]) -> None:
        self._store, self._part, self._shard, self._dtype = store, part, shard, dtype
        self._last: tuple[int, bytes] = (-1, b"")

    def read(self, start: int, num_tokens: int) -> npt.NDArray[Any]:
        """
        Raises:
            IntegrityError: its bytes are not those that were written. NotFound: it is gone.
        """
        size, whole = self._dtype.itemsize, self._part.piece_bytes
        first, end = start * size, (start + num_tokens) * size
        content = b"".join(self._piece(number) for number in range(first // whole, -(-end // whole)))
        return np.frombuffer(content, self._dtype, count=num_tokens, offset=first % whole)

    def _piece(self, number: int) -> bytes:
        if self._last[0] != number:
            content = read_piece(self._store, self._part, self._shard, number)
            self._last = (number, content)
        return self._last[1]


def read_piece(store: Store, part: EarlierPart, shard: Shard, number: int) -> bytes:
    """A piece of an earlier shard.

    Raises:
        IntegrityError: its bytes are not those that were written. NotFound: it is gone.
    """
    key, start = part.prefix + shard.file, number * part.piece_bytes
    content = store.get_range(key, start, min(part.piece_bytes, shard.size_bytes - start))
    if hashlib.sha256(content).hexdigest() != shard.pieces[number]:
        raise IntegrityError(f"{store.uri_of(key)}: the bytes from {start:,} on do not match their recorded digest.")
    return content


def take_part(job: PartJob, store: Store) -> Part | None:
    """A whole part of rows out of an earlier preparation, written as this job's; None where there is none."""
    for earlier in job.earlier:
        part = _read(store, earlier.prefix, earlier.file)
        if part is None or part.key != job.key:
            continue
        try:
            splits = {
                split: found
                if found.shard is None
                else found.model_copy(update={"shard": _copied(job, store, earlier, split, found.shard)})
                for split, found in part.splits.items()
            }
        except (NotFound, IntegrityError):
            continue
        return part.model_copy(update={"splits": splits, "slices": tuple(slice_done(piece) for piece in job.slices)})
    return None


def _copied(job: PartJob, store: Store, earlier: EarlierPart, split: SplitName, shard: Shard) -> Shard | None:
    content = b"".join(read_piece(store, earlier, shard, number) for number in range(len(shard.pieces)))
    return upload_shard(store, job, split, np.frombuffer(content, dtype="<u4"))
