"""A preparation that was killed goes on, and gives what an undisturbed one gives, in whatever order parts are made."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import IntegrityError
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import Here, Killed, all_but_manifest, long_text, prepare_with, word_tokenizer
from workloads.prepare.parts import Part

DATA = DataSpec(train="s3://corpus/**", eval_fraction=0.2, tokenizer="s3://tokenizers/tokenizer.json")
NUM_FILES = 30


def corpus() -> MemoryStore:
    store = MemoryStore()
    store.at("tokenizers").upload("tokenizer.json", word_tokenizer())
    for number in range(NUM_FILES):
        store.at("corpus").upload(f"{number:04d}.txt", long_text(number, 200_000).encode())
    return store


def contents(store: MemoryStore, manifest: DatasetManifest) -> tuple[dict[str, bytes], Any]:
    stored = all_but_manifest(store, layout.dataset("here", manifest.fingerprint))
    return stored, manifest.model_copy(update={"created_s": 0.0})


UNDISTURBED_STORE = corpus()
UNDISTURBED = contents(UNDISTURBED_STORE, prepare_with(UNDISTURBED_STORE, DATA))
NUM_PARTS = sum(name.startswith("parts/") for name in UNDISTURBED[0])


@given(killed_after=st.integers(0, NUM_PARTS), seed=st.integers(0, 2**32), leave_shards=st.booleans())
@settings(deadline=None, max_examples=15)
def test_a_killed_preparation_goes_on(killed_after: int, seed: int, leave_shards: bool) -> None:
    def shuffled(jobs: list[Any]) -> list[Any]:
        return random.Random(seed).sample(jobs, len(jobs))

    store = corpus()
    if killed_after < NUM_PARTS:
        with pytest.raises(Killed):
            prepare_with(store, DATA, run=Here(store, order=shuffled, fail_after=killed_after))
    if leave_shards:  # of a part that was killed between its shards and its file
        store.create(f"datasets/here/{UNDISTURBED[1].fingerprint}/train-00000.bin", UNDISTURBED[0]["train-00000.bin"])
    again = Here(store, order=shuffled)
    manifest = prepare_with(store, DATA, run=again)
    assert len(again.done) == NUM_PARTS - (killed_after if killed_after < NUM_PARTS else 0)
    assert contents(store, manifest) == UNDISTURBED


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_tasks_at_once_give_the_same(num_tasks: int) -> None:
    store = corpus()

    def run(work: Any, jobs: Any) -> Any:
        with ThreadPoolExecutor(num_tasks) as pool:
            for done in as_completed([pool.submit(work, job, store) for job in jobs]):
                yield done.result()

    assert contents(store, prepare_with(store, DATA, run=run)) == UNDISTURBED


def test_the_parts_say_where_each_token_came_from() -> None:
    store, manifest = UNDISTURBED_STORE, UNDISTURBED[1]
    assert NUM_PARTS > 2
    prefix = layout.dataset("here", manifest.fingerprint)
    assert [file.file for file in manifest.lineage.parts] == [f"parts/{number:05d}.json" for number in range(NUM_PARTS)]
    found = []
    for file in manifest.lineage.parts:
        content = store.get_verified(prefix + file.file, sha256=file.sha256, size_bytes=file.size_bytes)
        part = Part.model_validate_json(content)
        ends = {"train": 0, "eval": 0}
        for piece in part.slices:
            assert piece.uri == f"s3://corpus/{piece.path}"
            assert piece.etag
            (split,) = piece.splits
            extent = piece.splits[split]
            assert extent.start == ends[split]
            assert extent.num_tokens == 2 * (200_000 // 1000) + 2
            ends[split] += extent.num_tokens
        assert {split: found.shard.num_tokens for split, found in part.splits.items() if found.shard} == {
            split: end for split, end in ends.items() if end
        }
        found += [piece.path for piece in part.slices]
    assert found == [f"{number:04d}.txt" for number in range(NUM_FILES)]


def half_done() -> tuple[MemoryStore, str]:
    store = corpus()
    with pytest.raises(Killed):
        prepare_with(store, DATA, run=Here(store, fail_after=2))
    return store, layout.dataset("here", UNDISTURBED[1].fingerprint)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda part: {**part, "format": "headway/dataset-part/9"}, "Input should be 'headway/dataset-part/1'"),
        (lambda part: {**part, "key": "0" * 64}, "it is of another part"),
        (lambda part: {**part, "extra": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_part_that_is_none_of_this_dataset_is_refused(change: Any, why: str) -> None:
    store, prefix = half_done()
    key = f"{prefix}parts/00001.json"
    store.tamper(key, json.dumps(change(json.loads(store.get(key)))).encode())
    with pytest.raises(IntegrityError, match=why) as caught:
        prepare_with(store, DATA)
    assert "parts/00001.json" in caught.value.message
    assert caught.value.next_step


def test_a_shard_that_shrank_is_seen() -> None:
    store, prefix = half_done()
    shard = store.get(f"{prefix}train-00001.bin")
    store.tamper(f"{prefix}train-00001.bin", shard[:-2])
    with pytest.raises(IntegrityError, match=f"train-00001.bin has {len(shard) - 2} bytes, not {len(shard)}"):
        prepare_with(store, DATA)


def test_two_that_prepare_the_same_from_two_places_agree() -> None:
    store, _ = half_done()
    for item in list(store.at("corpus").list("")):
        store.at("copy").upload(item.key, store.at("corpus").get(item.key))
    manifest = prepare_with(store, DATA.model_copy(update={"train": "s3://copy/**"}))
    assert manifest.fingerprint == UNDISTURBED[1].fingerprint
    assert (manifest.train, manifest.eval) == (UNDISTURBED[1].train, UNDISTURBED[1].eval)
