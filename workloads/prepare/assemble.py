"""What the parts wrote, as a dataset's manifest: its splits, its counts, and whether too much of the source is bad."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.format import DatasetManifest, Split, Tokenizer
from orchestrator.dataset.source import SourceFile
from orchestrator.errors import RunError
from orchestrator.spec import DataSpec
from workloads.prepare.parts import Part, SplitName
from workloads.prepare.records import REASONS
from workloads.prepare.streams import stream_dtype

_MAX_SKIPPED = 0.01  # share of the source's files, and of its records
_MAX_NAMED = 20  # files and records that are named


def assemble(
    data: DataSpec,
    name: str,
    wanted: str,
    files: list[SourceFile],
    parts: list[Part],
    tokenizer: Tokenizer,
    classes: tuple[str, ...] = (),
) -> DatasetManifest:
    """The manifest of the dataset with the fingerprint ``wanted``.

    Raises:
        RunError: too much of the source is bad, or a split is empty.
    """
    skipped = [f"{file.path}: {file.why}" for part in parts for file in part.unreadable]
    _require_files(data, skipped, files)
    _require_records(parts)
    size = len(classes) or tokenizer.vocab_size
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    return DatasetManifest(
        name=name,
        fingerprint=wanted,
        dtype="uint16" if data.kind == "stream" and stream_dtype(tokenizer.vocab_size) is np.uint16 else "uint32",
        tokenizer=tokenizer,
        train=_split(parts, "train"),
        eval=_split(parts, "eval"),
        unigram_loss=unigram_loss(_frequencies(parts, "train", size), _frequencies(parts, "eval", size)),
        source={
            "pattern": data.train,
            "num_files": len(files),
            "num_bytes": sum(file.size_bytes for file in files),
            "num_skipped": len(skipped),
            "skipped": skipped[:_MAX_NAMED],
            **_records(data, parts),
        },
        created_s=time.time(),
        kind=data.kind,
        row_tokens=None if data.kind == "stream" else data.sequence_length + 1,
        classes=classes,
        counts={what: count for what, count in sorted(counts.items()) if count},
    )


def unigram_loss(train_counts: Any, eval_counts: Any) -> float:
    """Nats per held-out target under the training split's frequencies, each count plus one."""
    smoothed = np.asarray(train_counts, dtype=np.float64) + 1.0
    log_probability = np.log(smoothed / smoothed.sum())
    weights = np.asarray(eval_counts, dtype=np.float64)
    if not weights.any():
        raise RunError("data: the held-out split holds no tokens.")
    return float(-(weights * log_probability).sum() / weights.sum())


def _require_files(data: DataSpec, skipped: list[str], files: list[SourceFile]) -> None:
    if len(skipped) > max(1, _MAX_SKIPPED * len(files)):
        raise RunError(
            f"data: {len(skipped)} of {len(files)} files are not {data.format} in UTF-8 "
            f"(at most {_MAX_SKIPPED:.0%} may be): {'; '.join(skipped[:3])}.",
            next_step="Narrow data.train to the files meant, or set data.format.",
        )


def _require_records(parts: Sequence[Part]) -> None:
    num_bad, num_records = sum(part.num_bad for part in parts), sum(part.num_records for part in parts)
    if num_bad > max(1, _MAX_SKIPPED * num_records):
        raise RunError(
            f"data: {num_bad} of {num_records} records cannot be used (at most {_MAX_SKIPPED:.0%} may be): "
            f"{'; '.join(_named(parts)[:3])}.",
            next_step="Correct them or leave them out; docs/data.md says what a record holds.",
        )


def _records(data: DataSpec, parts: Sequence[Part]) -> dict[str, Any]:
    if data.kind == "stream":
        return {}
    return {
        "num_records": sum(part.num_records for part in parts),
        "num_bad_records": sum(part.num_bad for part in parts),
        "bad_records": _named(parts),
    }


def _named(parts: Sequence[Part]) -> list[str]:
    """The first bad records, as ``file:line`` and the reason."""
    before: Counter[str] = Counter()  # lines of a file's slices in earlier parts
    named = []
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


def _frequencies(parts: Sequence[Part], split: SplitName, size: int) -> npt.NDArray[np.float64]:
    total = np.zeros(size)
    for part in parts:
        found = part.splits[split].frequencies
        total[np.fromiter(found.keys(), dtype=np.int64)] += np.fromiter(found.values(), dtype=np.float64)
    return total


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
