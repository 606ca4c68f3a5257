"""Preparing a stream beside a single-process ``tokenizers`` loop over the same documents: MB of text a second and core.

The documents are Python files of this environment, as JSON lines in S3. Headway reads them there, parses and cleans
them, splits them, tokenizes them with a tokenizer that is given, and writes shards, parts and a manifest with their
digests, in Ray tasks of one CPU each; once with one CPU free and once with two. The loop has the documents in
memory and does nothing but tokenize them on one thread, by the fastest call that there is, and put the ids into
arrays. The three take turns, after a round that does not count.

    make bench NAME=prepare
    python -m tests.bench.prepare --megabytes 8 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.given import read_given
from orchestrator.dataset.source import list_source
from orchestrator.spec import DataSpec
from orchestrator.store import Store
from tests.bench.harness import at_least, finish, say, spread
from tests.bench.server import s3_store
from workloads.prepare import prepare

MIN_PER_CORE, MIN_SCALING = 0.9, 1.8
_MB = 1e6
_FILES = 8
_VOCABULARY = 8192
_TRAINED_BYTES = 4e6
_LOOP_DOCUMENTS = 64  # tokenized at once by the loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.prepare")
    parser.add_argument("--megabytes", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the loop; Headway's tasks do it themselves
    documents = python_files(options.megabytes * _MB)
    num_mb = sum(len(text.encode()) for text in documents) / _MB
    say(f"{len(documents)} documents, {num_mb:.1f} MB")
    with tempfile.TemporaryDirectory() as folder, s3_store(Path(folder)) as store, ray_of_two():
        backend = put_tokenizer(store, documents)
        pattern = put_documents(store, documents)
        rates: dict[str, list[float]] = {"loop": [], "one": [], "two": []}
        for number in range(options.rounds + 1):
            took = {"loop": loop_s(backend, documents)}
            with one_cpu_taken():
                took["one"] = prepare_s(store, pattern, f"one-{number}")
            took["two"] = prepare_s(store, pattern, f"two-{number}")
            say(", ".join(f"{name} {num_mb / seconds:.2f} MB/s" for name, seconds in took.items()))
            for name, seconds in took.items():
                rates[name] += [num_mb / seconds] if number else []
    per_core = [one / loop for one, loop in zip(rates["one"], rates["loop"], strict=True)]
    scaling = [two / one for two, one in zip(rates["two"], rates["one"], strict=True)]
    figures = {"megabytes": round(num_mb, 1), **{f"{name}_mb_s": spread(found) for name, found in rates.items()}}
    finish(
        "prepare",
        {**figures, "per_core": spread(per_core), "scaling": spread(scaling)},
        {
            "per_core": at_least(statistics.median(per_core), MIN_PER_CORE),
            "scaling": at_least(statistics.median(scaling), MIN_SCALING),
        },
    )


def python_files(num_bytes: float) -> list[str]:
    """Files of the standard library and of what is installed, each once, until there is so much text."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    found: dict[str, None] = {}
    total = 0
    for path in (path for folder in paths for path in sorted(Path(folder).rglob("*.py"))):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text and text not in found and len(text) < 2**20:
            found[text] = None
            total += len(text.encode())
        if total >= num_bytes:
            break
    return list(found)


def put_tokenizer(store: Store, documents: list[str]) -> Any:
    """Train a tokenizer on some of the documents, spread over them all, and keep it in the store."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = max(1, round(sum(map(len, documents)) / _TRAINED_BYTES))
    tokenizer.train_from_iterator(documents[::every], trainer)
    store.upload("tokenizer.json", str(tokenizer.to_str()).encode())
    return tokenizer


def put_documents(store: Store, documents: list[str]) -> str:
    """JSON lines in S3, and their address."""
    for number in range(_FILES):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents[number::_FILES]]
        store.upload(f"source/{number}.jsonl", "".join(lines).encode())
    return store.uri_of("source/*.jsonl")


def loop_s(backend: Any, documents: list[str]) -> float:
    """Seconds that tokenizing alone takes."""
    began_s = time.perf_counter()
    arrays = []
    for start in range(0, len(documents), _LOOP_DOCUMENTS):
        encodings = backend.encode_batch_fast(documents[start : start + _LOOP_DOCUMENTS], add_special_tokens=False)
        arrays += [np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings]
    np.concatenate(arrays)
    return time.perf_counter() - began_s


def prepare_s(store: Store, pattern: str, name: str) -> float:
    """Seconds from the listing of the source to the manifest."""
    data = DataSpec(train=pattern, format="jsonl", eval_fraction=0.3, tokenizer=store.uri_of("tokenizer.json"))
    began_s = time.perf_counter()
    manifest = prepare(data, name, list_source(pattern, store), store, tokenizer=read_given(data, store))
    took_s = time.perf_counter() - began_s
    _require_new(manifest)
    return took_s


def _require_new(manifest: DatasetManifest) -> None:
    if manifest.lineage is None or manifest.lineage.reused is not None:
        raise SystemExit(f"{manifest.name} took samples from {manifest.lineage}")


@contextmanager
def ray_of_two() -> Iterator[None]:
    """A local Ray of two CPUs, whose workers find what this process imports and have its priority: Ray's own, nice 15,
    would leave them what other work on the machine leaves, and the loop not."""
    os.environ |= {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def one_cpu_taken() -> Iterator[None]:
    """One of the two CPUs belongs to an actor that does nothing."""
    import ray

    holder = ray.remote(num_cpus=1)(_Holder).remote()
    ray.get(holder.is_there.remote())
    try:
        yield
    finally:
        ray.kill(holder)


class _Holder:
    def is_there(self) -> bool:
        return True


if __name__ == "__main__":
    main()
