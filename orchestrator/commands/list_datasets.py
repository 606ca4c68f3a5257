"""``headway list datasets``: what was prepared, beside each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.commands.text import Rows
from orchestrator.dataset.format import DatasetManifest, read_manifest
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.record.report import words
from orchestrator.store import Store, layout

_PARALLEL = 16
_FACTS = (
    "created_s",
    "train_tokens",
    "eval_tokens",
    "samples",
    "vocabulary",
    "num_files",
    "num_bad_records",
    "size_bytes",
    "source",
    "problem",
)


def list_datasets(store: Store) -> Rows:
    """The datasets, the newest first. One whose manifest cannot be read says why and hides no other."""
    places = [
        (name, fingerprint)
        for name in store.list_folders("datasets/")
        for fingerprint in store.list_folders(layout.datasets(name))
    ]
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="datasets") as pool:
        rows = [row for row in pool.map(lambda place: _row(store, *place), places) if row is not None]
    return sorted(rows, key=lambda row: row["created_s"] or 0.0, reverse=True)


def dataset_words(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people. Pure."""
    created_s, size_bytes = row["created_s"], row["size_bytes"]
    return {
        "dataset": row["dataset"],
        "created": words.moment(created_s) if created_s is not None else None,
        "train_tokens": row["train_tokens"],
        "eval_tokens": row["eval_tokens"],
        "samples": row["samples"],
        "vocabulary": row["vocabulary"],
        "files": row["num_files"],
        "bad_records": row["num_bad_records"],
        "size": f"{size_bytes / 1e6:,.1f} MB" if size_bytes is not None else None,
        "source": row["source"] if row["problem"] is None else f"not readable: {row['problem']}",
    }


def size_of(manifest: DatasetManifest) -> int:
    """Bytes of its shards."""
    return sum(shard.size_bytes for split in (manifest.train, manifest.eval) for shard in split.shards)


def _row(store: Store, name: str, fingerprint: str) -> dict[str, Any] | None:
    """None where there is no dataset yet: it is being made, or its making was given up."""
    row = {"dataset": f"{name}@{fingerprint}", **dict.fromkeys(_FACTS)}
    try:
        manifest = read_manifest(store, name, fingerprint)
    except NotFound:
        return None
    except IntegrityError as e:
        return {**row, "problem": e.message}
    return {
        **row,
        "created_s": manifest.created_s,
        "train_tokens": manifest.train.num_tokens,
        "eval_tokens": manifest.eval.num_tokens,
        "samples": manifest.kind,
        "vocabulary": manifest.tokenizer.vocab_size,
        "num_files": manifest.source.get("num_files"),
        "num_bad_records": manifest.source.get("num_bad_records", 0),
        "size_bytes": size_of(manifest),
        "source": manifest.source.get("pattern"),
    }
