"""What the parts wrote, as a dataset's manifest: its splits, its counts, and whether too much of the source is bad."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator import __version__
from orchestrator.dataset.format import DatasetManifest, Lineage, Split, Tokenizer
from orchestrator.dataset.source import SourceFile
from orchestrator.errors import AttemptFailed, RunError
from orchestrator.spec import DataSpec
from workloads.prepare.committed import PartDone
from workloads.prepare.parts import SPLITS, Part, SplitName, settings_digest, stream_dtype
from workloads.prepare.records import REASONS

_MAX_NAMED = 20  # files and records that are named


class Gathered:
    """The parts that are done. How often each token is a target is summed up as they come, since those of all parts of
    a large source would not fit in memory.

    Args:
        num_targets: tokens, or classes, that there are.
    """

    def __init__(self, num_targets: int) -> None:
        self.frequencies = {split: np.zeros(num_targets, dtype=np.int64) for split in SPLITS}
        self._done: dict[int, PartDone] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._done

    def add(self, done: PartDone) -> None:
        splits = {}
        for split, found in done.part.splits.items():
            values = np.fromiter(found.frequencies.keys(), dtype=np.int64)
            self.frequencies[split][values] += np.fromiter(found.frequencies.values(), dtype=np.int64)
            splits[split] = found.model_copy(update={"frequencies": {}})
        part = done.part.model_copy(update={"splits": splits})
        self._done[done.number] = done.model_copy(update={"part": part})

    @property
    def parts(self) -> list[PartDone]:
        """In their order, without frequencies."""
        return [done for _, done in sorted(self._done.items())]


def assemble(
    data: DataSpec,
    name: str,
    wanted: str,
    files: list[SourceFile],
    gathered: Gathered,
    tokenizer: Tokenizer,
    classes: tuple[str, ...] = (),
    *,
    by_record: bool,
    reused: str | None = None,
    left_out: Mapping[str, int] | None = None,
) -> DatasetManifest:
    """The manifest of the dataset with the fingerprint ``wanted``.

    Args:
        reused: the fingerprint of the preparation that samples were taken from.
        left_out: files of a source tree that do not belong to it, by reason.

    Raises:
        AttemptFailed: too much of the source is bad. RunError: a split is empty.
    """
    parts = [done.part for done in gathered.parts]
    unreadable = {file.path: file.why for part in parts for file in part.unreadable}
    source = {
        "pattern": data.train,
        "num_files": len(files),
        "num_bytes": sum(file.size_bytes for file in files),
        "num_skipped": len(unreadable),
        "skipped": [f"{path}: {why}" for path, why in unreadable.items()][:_MAX_NAMED],
        **_records(data, parts),
    }
    _require_files(data, source)
    _require_records(data, source)
    counts = Counter({f"left_out_{why}": count for why, count in (left_out or {}).items()})
    counts["skipped_unreadable_file"] = len(unreadable)
    for part in parts:
        counts.update(part.counts)
    return DatasetManifest(
        name=name,
        fingerprint=wanted,
        dtype="uint16" if data.kind == "stream" and stream_dtype(tokenizer.vocab_size) is np.uint16 else "uint32",
        tokenizer=tokenizer,
        train=_split(parts, "train"),
        eval=_split(parts, "eval"),
        unigram_loss=unigram_loss(gathered.frequencies["train"], gathered.frequencies["eval"]),
        source=source,
        created_s=time.time(),
        kind=data.kind,
        row_tokens=None if data.kind == "stream" else data.sequence_length + 1,
        classes=classes,
        counts={what: count for what, count in sorted(counts.items()) if count},
        lineage=Lineage(
            code_version=__version__,
            settings=settings_digest(data, by_record=by_record),
            parts=tuple(done.file for done in gathered.parts),
            reused=reused,
        ),
    )


def require_good(data: DataSpec, manifest: DatasetManifest) -> None:
    """Hold a dataset that was prepared under another limit to the one of now.

    Raises:
        AttemptFailed: too much of its source is bad. The limit is no part of the run's identity, so the same run may
        go on with another one.
    """
    _require_files(data, manifest.source)
    _require_records(data, manifest.source)


def unigram_loss(train_counts: Any, eval_counts: Any) -> float:
    """Nats per held-out target under the training split's frequencies, each count plus one."""
    smoothed = np.asarray(train_counts, dtype=np.float64) + 1.0
    log_probability = np.log(smoothed / smoothed.sum())
    weights = np.asarray(eval_counts, dtype=np.float64)
    if not weights.any():
        raise RunError("data: the held-out split holds no tokens.")
    return float(-(weights * log_probability).sum() / weights.sum())


def _require_files(data: DataSpec, source: Mapping[str, Any]) -> None:
    if source["num_skipped"] > _allowed(data, source["num_files"]):
        raise AttemptFailed(
            f"data: {source['num_skipped']} of {source['num_files']} files are not {data.format} in UTF-8 "
            f"({_at_most(data)}): {'; '.join(source['skipped'][:3])}.",
            next_step="Narrow data.train to the files meant, or set data.format or data.max_bad_records.",
        )


def _require_records(data: DataSpec, source: Mapping[str, Any]) -> None:
    num_bad, num_records = source.get("num_bad_records", 0), source.get("num_records", 0)
    if num_bad > _allowed(data, num_records):
        raise AttemptFailed(
            f"data: {num_bad} of {num_records} records cannot be used ({_at_most(data)}): "
            f"{'; '.join(source['bad_records'][:3])}.",
            next_step="Correct them, leave them out, or raise data.max_bad_records; docs/data.md says what a record "
            "holds.",
        )


def _allowed(data: DataSpec, count: int) -> float:
    """How many may be bad: one always, unless none may."""
    return max(1.0, data.max_bad_records * count) if data.max_bad_records else 0.0


def _at_most(data: DataSpec) -> str:
    return f"at most {100 * data.max_bad_records:g}% may be"


def _records(data: DataSpec, parts: Sequence[Part]) -> dict[str, Any]:
    if data.format in ("text", "source"):
        return {}
    return {
        "num_records": sum(part.num_records for part in parts),
        "num_bad_records": sum(part.num_bad for part in parts),
        "bad_records": _named(parts),
    }


def _named(parts: Sequence[Part]) -> list[str]:
    """The first bad records, as ``file:line`` and the reason."""
    before: Counter[str] = Counter()  # lines of a file's slices in earlier parts
    named: list[str] = []
    for part in parts:
        for bad in part.bad:
            detail = f": {bad.detail}" if bad.detail else ""
            named.append(f"{bad.path}:{before[bad.path] + bad.line} {REASONS[bad.reason]}{detail}")
        before.update(part.lines)
    return named[:_MAX_NAMED]


def _left_out(parts: Sequence[Part], name: SplitName) -> list[str]:
    """What a split lacks, records and files, in words."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update({what: count for what, count in part.counts.items() if what.startswith(f"{name}.skipped_")})
    told = [f"{count} {what.split('skipped_')[-1]}" for what, count in sorted(counts.items())]
    return told + [f"{file.path}: {file.why}" for part in parts for file in part.unreadable][:1]


def _split(parts: Sequence[Part], name: SplitName) -> Split:
    mine = [part.splits[name] for part in parts]
    shards = tuple(part.shard for part in mine if part.shard is not None)
    if not shards:
        left_out = _left_out(parts, name)
        raise RunError(
            f"data: the {name} split holds no text{' (left out: ' + ', '.join(left_out) + ')' if left_out else ''}.",
            next_step="Use more data, another data.eval_fraction, or a larger data.sequence_length.",
        )
    targets = [part.num_targets for part in mine if part.num_targets is not None]
    return Split(
        shards=shards,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_bytes=sum(part.num_bytes for part in mine),
        num_files=len({path for part in mine for path in part.files}),
        num_targets=sum(targets) if targets else None,
    )
