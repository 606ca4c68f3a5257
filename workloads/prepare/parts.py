"""Parts of a source: what one of them is told, and what it gives back."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from orchestrator.dataset.format import PartFile, Shard, Tokenizer, is_held_out, settings
from orchestrator.dataset.source import Slice, SourceFile
from orchestrator.spec import DataSpec, canonical_json
from orchestrator.store import Store
from workloads.prepare.once import create_alike
from workloads.prepare.records import Unusable

_MAX_NAMED = 20  # bad records that are named
_COUNTED = 2**20  # entries at a time, of which NumPy makes 64-bit ones to count them

SplitName = Literal["train", "eval"]
SPLITS: tuple[SplitName, ...] = ("train", "eval")

Item = TypeVar("Item")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EarlierPart(_Frozen):
    """A part of an earlier preparation, of which samples may be taken."""

    prefix: str
    piece_bytes: int
    file: PartFile


class PartJob(_Frozen):
    """One part's work, as it travels to the node that does it."""

    number: int
    slices: tuple[Slice, ...]
    data: DataSpec
    store: str
    prefix: str
    tokenizer: Tokenizer
    by_record: bool
    """Whether the held-out split is of records, by a hash of each, and not of files."""
    classes: tuple[str, ...] = ()
    earlier: tuple[EarlierPart, ...] = ()

    def split_of(self, file: SourceFile, record: str) -> SplitName:
        """Where a record belongs."""
        what = record if self.by_record else file.path
        return "eval" if is_held_out(what, self.data.eval_fraction) else "train"

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.slices)

    @property
    def key(self) -> str:
        """Digest of all that the part's samples depend on."""
        facts = {
            "settings": settings_digest(self.data, by_record=self.by_record),
            "tokenizer": self.tokenizer.model_dump(mode="json"),
            "classes": self.classes,
            "slices": [slice_key(piece) for piece in self.slices],
        }
        return hashlib.sha256(canonical_json(facts)).hexdigest()


def settings_digest(data: DataSpec, *, by_record: bool) -> str:
    """Of all that the samples depend on but for the files and the tokenizer."""
    return hashlib.sha256(canonical_json({**settings(data), "by_record": by_record})).hexdigest()


def slice_key(piece: Slice) -> tuple[str, str, int, int, int]:
    """What tells whether a slice is the same as one of an earlier preparation, wherever it lies."""
    return piece.file.path, piece.file.etag, piece.file.size_bytes, piece.number, piece.of


class SplitPart(_Frozen):
    """What one part gives to one split."""

    shard: Shard | None
    num_bytes: int
    num_targets: int | None
    files: tuple[str, ...]
    frequencies: dict[int, int]
    """How often each token, or class, is a target."""


class BadRecord(_Frozen):
    path: str
    line: int
    """From 1 within what the part, or the slice, holds of the file; of Parquet the row."""
    reason: str
    detail: str = ""


class BadFile(_Frozen):
    path: str
    why: str


class Tallied(_Frozen):
    """What became of records."""

    unreadable: tuple[BadFile, ...] = ()
    """Files, or slices of them, that are not what the format says, each left out as a whole."""
    counts: dict[str, int] = {}
    bad: tuple[BadRecord, ...] = ()
    """The first few."""
    num_bad: int = 0
    num_records: int = 0
    lines: dict[str, int] = {}
    """Lines in what is here of each file."""


class Extent(_Frozen):
    """What a slice gives to a shard of a stream."""

    start: int
    """Of its first token within the shard."""
    num_tokens: int
    num_bytes: int
    """Of text."""
    num_documents: int


class SliceDone(Tallied):
    """A slice of a source file, and what became of it. The tallies are kept for streams alone."""

    uri: str
    path: str
    etag: str
    size_bytes: int
    """Of the whole file."""
    number: int = 0
    of: int = 1
    splits: dict[SplitName, Extent] = {}
    """Of a stream; rows may hold what came from several files."""

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """As :func:`slice_key`."""
        return self.path, self.etag, self.size_bytes, self.number, self.of


class Part(Tallied):
    """What became of one part, as ``parts/00012.json`` holds it. What it says follows from the source and the part's
    number, so two tries at one part write the same."""

    format: Literal["headway/dataset-part/1"]
    key: str
    """As :attr:`PartJob.key`."""
    splits: dict[SplitName, SplitPart]
    slices: tuple[SliceDone, ...]


class Tally:
    """Counts, over one part or one slice, what becomes of its records."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.num_records = 0
        self._unreadable: list[BadFile] = []
        self._bad: list[BadRecord] = []
        self._num_bad = 0

    def skip(
        self, file: SourceFile, line: int, why: Unusable, *, split: SplitName | None = None, bad: bool = True
    ) -> None:
        """Count a record that is left out. ``bad``: it is at fault itself, and not just longer than a sample."""
        self.counts[f"{split}.skipped_{why.reason}" if split else f"skipped_{why.reason}"] += 1
        self._num_bad += bad
        if bad and len(self._bad) < _MAX_NAMED:
            self._bad.append(BadRecord(path=file.path, line=line, reason=why.reason, detail=why.detail))

    def skip_file(self, file: SourceFile, why: str) -> None:
        """Name a file, or a slice of one, that is left out as a whole."""
        self._unreadable.append(BadFile(path=file.path, why=why))

    def add(self, other: Tallied) -> None:
        """Count what was tallied of what follows."""
        for bad in other.bad[: _MAX_NAMED - len(self._bad)]:
            self._bad.append(bad.model_copy(update={"line": self.lines[bad.path] + bad.line}))
        self.counts.update(other.counts)
        self.lines.update(other.lines)
        self.num_records += other.num_records
        self._unreadable += other.unreadable
        self._num_bad += other.num_bad

    def tallied(self) -> dict[str, Any]:
        """The fields of a :class:`Tallied`."""
        return {
            "unreadable": tuple(self._unreadable),
            "counts": {what: count for what, count in sorted(self.counts.items()) if count},
            "bad": tuple(self._bad),
            "num_bad": self._num_bad,
            "num_records": self.num_records,
            "lines": dict(self.lines),
        }


def part_of(
    job: PartJob, splits: dict[SplitName, SplitPart], tally: Tally, slices: Iterable[SliceDone] | None = None
) -> Part:
    """What became of a job's part."""
    return Part(
        format="headway/dataset-part/1",
        key=job.key,
        splits=splits,
        slices=tuple(slice_done(piece) for piece in job.slices) if slices is None else tuple(slices),
        **tally.tallied(),
    )


def slice_done(piece: Slice, splits: dict[SplitName, Extent] | None = None, tally: Tally | None = None) -> SliceDone:
    """A slice with where it came from."""
    file = piece.file
    return SliceDone(
        uri=file.uri,
        path=file.path,
        etag=file.etag,
        size_bytes=file.size_bytes,
        number=piece.number,
        of=piece.of,
        splits=splits or {},
        **(tally.tallied() if tally is not None else {}),
    )


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, so many at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def stream_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Of the tokens of a stream; rows are always of 32 bits."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def shard_name(split: SplitName, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def upload_shard(store: Store, job: PartJob, split: SplitName, entries: npt.NDArray[Any]) -> Shard | None:
    """Write a part's share of a split; None where there is nothing of it."""
    if not len(entries):
        return None
    shard, data = Shard.of(shard_name(split, job.number), entries)
    create_alike(store, job.prefix + shard.file, data)
    return shard


def frequencies(targets: npt.NDArray[Any]) -> dict[int, int]:
    counts = np.zeros(int(targets.max()) + 1 if len(targets) else 0, dtype=np.int64)
    for start in range(0, len(targets), _COUNTED):
        counts += np.bincount(targets[start : start + _COUNTED], minlength=len(counts))
    (values,) = np.nonzero(counts)
    return dict(zip(values.tolist(), counts[values].tolist(), strict=True))
