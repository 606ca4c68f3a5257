"""Prepares a source in memory, part by part, the way that the tasks of a cluster do."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest, Split
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.rows import Rows
from orchestrator.dataset.source import list_source
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from workloads.prepare import part_jobs, prepare_part, split_by_record
from workloads.prepare.assemble import assemble
from workloads.prepare.labels import class_names, scan_part
from workloads.prepare.vocabulary import store_pretrained, store_trained

FINGERPRINT = "0123456789abcdef"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    store: MemoryStore
    manifest: DatasetManifest

    def rows(self, split: Split, cache: Path) -> Rows:
        """All rows of a split."""
        length = (self.manifest.row_tokens or 0) - 1
        shutil.rmtree(cache, ignore_errors=True)
        reader = TokenReader(self.store, self.manifest, split, sequence_length=length, cache=cache)
        return reader.rows(np.arange(reader.num_samples, dtype=np.int64))


def prepare_here(data: DataSpec, store: MemoryStore, base: Path | None = None) -> Prepared:
    files, prefix = list_source(data.train or "", store), layout.dataset("here", FINGERPRINT)
    store.delete([item.key for item in store.list(prefix)])
    by_record = split_by_record(data, files)
    if base is None:
        tokenizer = store_trained(data, files, store, prefix, by_record=by_record)
    else:
        tokenizer = store_pretrained(data, base, store, prefix)
    jobs = part_jobs(data, files, store, prefix, tokenizer, by_record=by_record)
    classes: tuple[str, ...] = ()
    if data.kind == "labelled":
        classes = class_names([scan_part(job, store) for job in jobs], data.label_field or "")
        jobs = [job.model_copy(update={"classes": classes}) for job in jobs]
    parts = [prepare_part(job, store) for job in jobs]
    return Prepared(store=store, manifest=assemble(data, "here", FINGERPRINT, files, parts, tokenizer, classes))


def json_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out)
    return out.getvalue()


def talk(number: int, *, words: int = 4) -> dict[str, Any]:
    """A record of one to three turns, the same for the same number."""
    said = random.Random(number)

    def some() -> str:
        return " ".join(said.choice(["alpha", "beta", "gamma", "delta", "ü", "🙂"]) for _ in range(words)) + str(number)

    turns = [{"role": role, "content": some()} for _ in range(1 + number % 3) for role in ("user", "assistant")]
    return {"messages": [{"role": "system", "content": "You are terse."}, *turns]}


def put(store: MemoryStore, content: bytes, name: str = "all.jsonl") -> MemoryStore:
    """The store with a source of this content."""
    store.at("corpus").upload(name, content)
    return store
