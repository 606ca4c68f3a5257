"""Preparing in Ray tasks against a real S3 server: what the tasks write is what one process would write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.dataset.format import read_manifest
from orchestrator.dataset.given import read_given
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.source import list_source, source_fingerprint
from orchestrator.errors import RunError
from orchestrator.pretrained.format import read_base
from orchestrator.runs import identify
from orchestrator.spec import DataSpec
from orchestrator.store import Store, layout, open_store
from tests.unit.workloads import chat_templates as templates
from tests.unit.workloads.bases import run_spec, save_base
from tests.unit.workloads.preparing import json_lines
from workloads.cluster import own_errors
from workloads.dataset_job import prepare_dataset
from workloads.prepare import part_jobs, prepare, prepare_part, split_by_record
from workloads.prepare.cluster import on_cluster
from workloads.prepare.parts import PartJob
from workloads.prepare.vocabulary import load_tokenizer

LENGTH = 255
TOKENIZER_FINGERPRINT = "0011223344556677"


@dataclass(frozen=True, kw_only=True)
class Base:
    """As much of a pretrained model as preparing data looks at."""

    directory: Path
    trust_remote_code: bool = False


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = templates.byte_level("chatml", templates.CHATML, vocab_size=300)
    return Base(directory=templates.save(tmp_path_factory.mktemp("base"), tokenizer))


def put(store: Store, content: bytes, name: str = "all.jsonl") -> str:
    """The address of one file in the store's bucket."""
    folder = f"sources/{secrets.token_hex(6)}"
    store.at(store.bucket).upload(f"{folder}/{name}", content)
    return f"s3://{store.bucket}/{folder}/**"


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and one more?"},
                {"role": "assistant", "content": f"It is {number + 1}. " + "So it goes. " * (number % 5)},
            ]
        }
        for number in range(count)
    ]


def shards_of(store: Store, prefix: str) -> dict[str, bytes]:
    return {item.key[len(prefix) :]: store.get(item.key) for item in store.list(prefix) if item.key.endswith(".bin")}


@pytest.mark.usefixtures("ray_of_two")
def test_conversations_are_prepared_by_tasks_as_by_one_process(store: Store, base: Any, tmp_path: Path) -> None:
    pattern = put(store, json_lines(conversations(16_000)))
    data = DataSpec(train=pattern, format="messages", sequence_length=LENGTH, eval_fraction=0.1)
    files = list_source(pattern, store)
    manifest = prepare(data, "chats", files, store, base=base, tokenizer_fingerprint=TOKENIZER_FINGERPRINT)
    assert read_manifest(store, "chats", manifest.fingerprint) == manifest
    assert 1 < len(manifest.train.shards) <= files[0].size_bytes // 2**20
    counts = manifest.counts
    assert counts["train.samples"] + counts["eval.samples"] == 16_000
    assert not any(what.endswith(".truncated") for what in counts)

    alone = open_store(f"{store.uri}/alone")
    prefix = layout.dataset("chats", manifest.fingerprint)
    for name in (manifest.tokenizer.file, *manifest.tokenizer.files):
        alone.create(prefix + name, store.get(prefix + name))
    jobs = part_jobs(data, files, alone, prefix, manifest.tokenizer, by_record=split_by_record(data, files))
    for job in jobs:
        prepare_part(job, alone)
    assert shards_of(alone, prefix) == shards_of(store, prefix)

    tokenizer = load_tokenizer(base.directory)
    row = TokenReader(store, manifest, manifest.eval, sequence_length=LENGTH, cache=tmp_path).rows(np.array([0]))
    said = tokenizer.decode(row["tokens"][row["is_target"]])
    assert said.startswith("It is ")
    assert said.endswith("<|im_end|>")


@pytest.mark.usefixtures("ray_of_two")
def test_a_dataset_that_stands_is_not_made_again(store: Store, base: Any) -> None:
    pattern = put(store, json_lines(conversations(200)))
    data = DataSpec(train=pattern, format="messages", sequence_length=LENGTH, eval_fraction=0.1)
    first, second = (
        prepare(data, "chats", list_source(pattern, store), store, base=base, tokenizer_fingerprint="a" * 16)
        for _ in range(2)
    )
    assert first == second
    other = prepare(data, "chats", list_source(pattern, store), store, base=base, tokenizer_fingerprint="b" * 16)
    assert other.fingerprint != first.fingerprint


@pytest.mark.usefixtures("ray_of_two")
def test_a_job_copies_the_pretrained_model_and_gives_the_dataset_its_tokenizer(store: Store, tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base")
    spec = run_spec(
        model={"pretrained": str(directory)},
        data={"train": put(store, json_lines(conversations(200))), "format": "messages", "sequence_length": LENGTH},
    )
    said: list[str] = []
    manifest = prepare_dataset(spec, store, working_directory=tmp_path, say=said.append)
    assert manifest.tokenizer.sha256 == hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    assert said[:2] == ["base …", "prepare …"]
    wanted = identify(spec, store, tmp_path, edition=0)
    assert wanted.dataset_fingerprint == manifest.fingerprint
    assert wanted.base is not None
    assert read_base(store, wanted.base.fingerprint).files


@pytest.mark.usefixtures("ray_of_two")
def test_labelled_texts_are_prepared_from_scratch(store: Store, tmp_path: Path) -> None:
    records = [{"text": f"text number {number}", "stars": number % 3} for number in range(300)]
    pattern = put(store, json_lines(records))
    data = DataSpec(
        train=pattern, format="jsonl", label_field="stars", vocab_size=300, sequence_length=32, eval_fraction=0.1
    )
    manifest = prepare(data, "reviews", list_source(pattern, store), store)
    assert manifest.classes == ("0", "1", "2")
    rows = TokenReader(store, manifest, manifest.train, sequence_length=32, cache=tmp_path).rows(np.arange(5))
    assert rows["label"].shape == (5,)
    assert (rows["tokens"][:, 0] == manifest.tokenizer.end_of_text_id).all()


@pytest.mark.usefixtures("ray_of_two")
def test_what_is_wrong_with_the_classes_is_told_before_anything_is_tokenized(store: Store) -> None:
    pattern = put(store, json_lines([{"text": f"text {number}", "kind": "only"} for number in range(50)]))
    data = DataSpec(train=pattern, format="jsonl", label_field="kind", vocab_size=300, eval_fraction=0.1)
    with pytest.raises(RunError, match="one class alone, 'only'"):
        prepare(data, "one", list_source(pattern, store), store)
    assert not [item.key for item in store.list(layout.datasets("one")) if item.key.endswith(".bin")]


@pytest.mark.usefixtures("ray_of_two")
def test_a_killed_preparation_goes_on_and_gives_the_same(store: Store, base: Any) -> None:
    import ray

    store.at(store.bucket, store.prefix).upload("tokenizer.json", (base.directory / "tokenizer.json").read_bytes())
    texts = [{"text": json.dumps(one)} for one in conversations(30_000)]
    data = DataSpec(
        train=put(store, json_lines(texts)),
        format="jsonl",
        tokenizer=store.uri_of("tokenizer.json"),
        end_of_text="<|im_end|>",
        eval_fraction=0.1,
    )
    files, given = list_source(data.train or "", store), read_given(data, store)
    assert given is not None
    prefix = layout.dataset("texts", source_fingerprint(data, files, given.fingerprint))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.integration.prepare_process", address, store.uri, "texts"]
    process = subprocess.Popen([*command, data.model_dump_json()])
    try:
        finished = wait_for_parts(store, prefix, 1, process)
    finally:
        process.kill()
        process.wait()
    assert not store.exists(f"{prefix}manifest.json")

    said: list[str] = []
    manifest = prepare(data, "texts", files, store, tokenizer=given, say=said.append)
    assert manifest.lineage is not None
    num_parts = len(manifest.lineage.parts)
    assert finished < num_parts
    there = re.search(r"(\d+) parts were there", said[-1])
    assert there is not None, said
    assert finished <= int(there[1]) < num_parts

    alone = open_store(f"{store.uri}/alone")
    undisturbed = prepare(data, "texts", files, alone, tokenizer=given, run=one_by_one(alone))
    assert undisturbed.model_copy(update={"created_s": manifest.created_s}) == manifest
    assert shards_of(alone, prefix) == shards_of(store, prefix)


@pytest.mark.usefixtures("ray_of_two")
def test_after_a_part_that_failed_no_other_is_begun(store: Store, base: Any) -> None:
    pattern = put(store, json_lines(conversations(40)))
    data = DataSpec(train=pattern, format="messages", sequence_length=LENGTH)
    files = list_source(pattern, store)
    manifest = prepare(data, "chats", files, store, base=base, tokenizer_fingerprint=TOKENIZER_FINGERPRINT)
    (job,) = part_jobs(data, files, store, "begun/", manifest.tokenizer, by_record=True)
    jobs = [job.model_copy(update={"number": number}) for number in range(40)]
    with own_errors(), pytest.raises(RunError, match="part 3 is bad"):
        list(on_cluster(begin_or_fail, jobs))
    begun = len(list(store.list("begun/")))
    assert begun < len(jobs) // 2
    assert list(on_cluster(begin_or_fail, jobs[:1])) == [job]  # the CPUs are free again
    assert len(list(store.list("begun/"))) <= begun + 2


def begin_or_fail(job: PartJob, store: Store) -> PartJob:
    """Takes a while."""
    if job.number == 3:
        raise RunError("part 3 is bad")
    store.upload(f"{job.prefix}{job.number}", b"")
    time.sleep(0.2)
    return job


def wait_for_parts(store: Store, prefix: str, count: int, process: subprocess.Popen[bytes]) -> int:
    """How many parts are finished, once there are ``count`` of them."""
    for _ in range(3000):
        found = len(list(store.list(f"{prefix}parts/")))
        if found >= count:
            return found
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"preparing ended with {process.wait(0.1)}")
    raise AssertionError("no parts in five minutes")


def one_by_one(store: Store) -> Any:
    """Works on the parts in this process, one after the other."""
    return lambda work, jobs: (work(job, store) for job in jobs)
