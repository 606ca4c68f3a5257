"""``headway show NAME@FINGERPRINT``: what a dataset holds and what it was made of; and what names a dataset."""

from __future__ import annotations

import re
from typing import Any

from orchestrator.commands.list_datasets import size_of
from orchestrator.dataset.format import DatasetManifest, Split, find_dataset, read_manifest
from orchestrator.errors import IntegrityError, NotFound, SpecError, UsageError
from orchestrator.store import Store, layout

Facts = dict[str, Any]
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


def named_dataset(store: Store, name: str) -> DatasetManifest | None:
    """The dataset that NAME@FINGERPRINT means, or NAME (its newest); None where the name is that of no dataset.

    Raises:
        UsageError: there is none of this fingerprint. IntegrityError: its manifest cannot be read.
    """
    folder, at, fingerprint = name.partition("@")
    if not at:
        return _newest(store, folder)
    if not _FINGERPRINT.fullmatch(fingerprint):
        return None
    try:
        found = read_manifest(store, folder, fingerprint)
    except NotFound as e:
        raise UsageError(f"There is no dataset {name} in {store.uri}.", next_step="See: headway list datasets") from e
    if (found.name, found.fingerprint) != (folder, fingerprint):
        key = layout.dataset_manifest(folder, fingerprint)
        raise IntegrityError(f"{store.uri_of(key)} is the manifest of {found.name}@{found.fingerprint}.")
    return found


def dataset_facts(manifest: DatasetManifest) -> Facts:
    """What the manifest holds, without the digests of each shard. Pure."""
    return {
        "dataset": f"{manifest.name}@{manifest.fingerprint}",
        "created_s": manifest.created_s,
        "samples": manifest.kind,
        "row_tokens": manifest.row_tokens,
        "classes": list(manifest.classes),
        "size_bytes": size_of(manifest),
        "dtype": manifest.dtype,
        "splits": {"train": _split(manifest.train), "eval": _split(manifest.eval)},
        "unigram_loss": manifest.unigram_loss,
        "counts": dict(manifest.counts),
        "tokenizer": manifest.tokenizer.model_dump(mode="json", exclude={"files"})
        | {"files": [manifest.tokenizer.file, *sorted(manifest.tokenizer.files)]},
        "source": manifest.source,
        "lineage": _lineage(manifest),
    }


def dataset_lines(facts: Facts) -> Facts:
    """The same for people: without what is empty. Pure."""
    return {name: value for name, value in facts.items() if value not in (None, [], {})}


def _newest(store: Store, name: str) -> DatasetManifest | None:
    try:
        return find_dataset(store, name)
    except SpecError:
        return None


def _lineage(manifest: DatasetManifest) -> Facts | None:
    """By which code, of how many parts, and what was taken from an earlier preparation."""
    if manifest.lineage is None:
        return None
    parts = manifest.lineage.parts
    return {"num_parts": len(parts), **manifest.lineage.model_dump(mode="json", exclude={"parts"})}


def _split(split: Split) -> Facts:
    return {"num_shards": len(split.shards), **split.model_dump(mode="json", exclude={"shards"})}
