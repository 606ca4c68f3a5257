"""Parts of a source: how it is cut into them, what one of them is told, and what it gives back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from orchestrator.dataset.format import Shard, Tokenizer, is_held_out
from orchestrator.dataset.source import Slice, SourceFile
from orchestrator.spec import DataSpec
from orchestrator.store import Store
from workloads.prepare.records import Unusable

_MIN_PART_BYTES, _MAX_PART_BYTES, _PARTS = 2**20, 128 * 2**20, 16
_MAX_NAMED = 20  # bad records that are named

SplitName = Literal["train", "eval"]
SPLITS: tuple[SplitName, ...] = ("train", "eval")


class _Sized(Protocol):
    @property
    def size_bytes(self) -> int: ...


Piece = TypeVar("Piece", bound=_Sized)
Item = TypeVar("Item")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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

    def split_of(self, file: SourceFile, record: str) -> SplitName:
        """Where a record belongs."""
        what = record if self.by_record else file.path
        return "eval" if is_held_out(what, self.data.eval_fraction) else "train"


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
    """From 1 within the slice; the row of a Parquet file."""
    reason: str
    detail: str = ""


class BadFile(_Frozen):
    path: str
    why: str


class Part(_Frozen):
    """What became of one part."""

    splits: dict[SplitName, SplitPart]
    unreadable: tuple[BadFile, ...] = ()
    """Files that are not what the format says, each left out as a whole."""
    counts: dict[str, int] = {}
    bad: tuple[BadRecord, ...] = ()
    """The first few."""
    num_bad: int = 0
    num_records: int = 0
    lines: dict[str, int] = {}
    """Lines in each file, or in this part's slices of it."""


class Tally:
    """Counts, over one part, what becomes of its records."""

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
        """Count a file that is left out as a whole."""
        self.counts["skipped_unreadable_file"] += 1
        self._unreadable.append(BadFile(path=file.path, why=why))

    def part(self, splits: dict[SplitName, SplitPart]) -> Part:
        return Part(
            splits=splits,
            unreadable=tuple(self._unreadable),
            counts=dict(sorted(self.counts.items())),
            bad=tuple(self._bad),
            num_bad=self._num_bad,
            num_records=self.num_records,
            lines=dict(self.lines),
        )


def cut(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Files in order, in parts of about a sixteenth of the source and at most 128 MiB."""
    pieces = list(pieces)
    limit = part_bytes(sum(piece.size_bytes for piece in pieces))
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += piece.size_bytes
        if size >= limit:
            yield part
            part, size = [], 0
    if part:
        yield part


def part_bytes(source_bytes: int) -> int:
    """The size at which a part is full."""
    return min(_MAX_PART_BYTES, max(_MIN_PART_BYTES, source_bytes // _PARTS))


def slices_of(files: list[SourceFile], data: DataSpec) -> list[Slice]:
    """The pieces that parts are made of: whole files, but JSON lines of records in slices of a part's size."""
    limit = part_bytes(sum(file.size_bytes for file in files))
    slices = []
    for file in files:
        of = 1 if data.kind == "stream" or is_parquet(file, data) else max(1, file.size_bytes // limit)
        slices += [Slice(file=file, number=number, of=of) for number in range(of)]
    return slices


def is_parquet(file: SourceFile, data: DataSpec) -> bool:
    return data.format == "parquet" or (data.format == "messages" and file.path.endswith(".parquet"))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, so many at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def upload_shard(store: Store, prefix: str, file: str, entries: npt.NDArray[Any]) -> Shard | None:
    """Write a part's share of a split; None where there is nothing of it."""
    if not len(entries):
        return None
    shard, data = Shard.of(file, entries)
    store.create(prefix + file, data)  # the same bytes are there already where an earlier try got this far
    return shard


def frequencies(targets: npt.NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(targets, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
