"""Prepares a source in memory, part by part, the way that the tasks of a cluster do."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest, Split
from orchestrator.dataset.given import read_given
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.rows import Rows
from orchestrator.dataset.source import list_source
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from workloads.prepare import part_jobs, prepare, prepare_part, split_by_record
from workloads.prepare.assemble import Gathered, assemble
from workloads.prepare.committed import PartDone
from workloads.prepare.labels import class_names, scan_part
from workloads.prepare.parts import PartJob
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
    parts = Gathered(len(classes) or tokenizer.vocab_size)
    for job in jobs:
        parts.add(prepare_part(job, store))
    manifest = assemble(data, "here", FINGERPRINT, files, parts, tokenizer, classes, by_record=by_record)
    return Prepared(store=store, manifest=manifest)


class Here:
    """Works on the parts in this process, as ``run`` of :func:`workloads.prepare.prepare`.

    Args:
        order: of the parts, one after the other.
        fail_after: dies when so many are done.
    """

    def __init__(
        self,
        store: MemoryStore,
        *,
        order: Callable[[list[PartJob]], list[PartJob]] = list,
        fail_after: int | None = None,
    ) -> None:
        self._store, self._order, self._fail_after = store, order, fail_after
        self.done: list[Any] = []

    def __call__(self, work: Any, jobs: Sequence[PartJob]) -> Iterator[Any]:
        for number, job in enumerate(self._order(list(jobs))):
            if number == self._fail_after:
                raise Killed
            told = PartJob.model_validate_json(job.model_dump_json())
            made = work(told, self._store)
            self.done.append(type(made).model_validate_json(made.model_dump_json()))
            yield self.done[-1]

    @property
    def num_tokenized(self) -> int:
        """Slices that were not taken from an earlier preparation."""
        return sum(done.num_slices - done.num_reused for done in self.done if isinstance(done, PartDone))


class Killed(Exception):
    """The process died."""


def word_tokenizer() -> bytes:
    """A tokenizer.json that knows a few words. Text of long other words costs it little."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, **{f"w{number}": number + 2 for number in range(50)}}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    return str(tokenizer.to_str()).encode()


def long_text(seed: int, num_bytes: int) -> str:
    """Text of a few known words, the same for the same seed, between others that are 1000 letters long."""
    said = random.Random(seed)
    words = [f"w{said.randrange(50)} {'x' * 1000}" for _ in range(num_bytes // 1000)]
    return " ".join([*words, f"w{seed % 50}"])


def all_but_manifest(store: MemoryStore, prefix: str) -> dict[str, bytes]:
    """The objects of a dataset: shards, parts and tokenizer."""
    return {
        key.removeprefix(prefix): content
        for key, content in store.objects.items()
        if key.startswith(prefix) and not key.endswith("/manifest.json")
    }


def prepare_with(store: MemoryStore, data: DataSpec, **how: Any) -> DatasetManifest:
    """All of preparing, in this process."""
    files = list_source(data.train or "", store, tree=data.format == "source")
    return prepare(data, "here", files, store, **{"tokenizer": read_given(data, store), "run": Here(store), **how})


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
