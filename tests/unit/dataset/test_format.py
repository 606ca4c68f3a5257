"""Fingerprints and the held-out split stay what they are, and a manifest that lies is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from orchestrator.dataset.format import find_dataset, fingerprint, is_held_out, read_manifest
from orchestrator.errors import IntegrityError, NotFound, SpecError
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

LISTING = [("a.py", "etag-1", 10), ("b/c.py", "etag-2", 20)]
DATA = DataSpec(train="s3://bucket/**/*.py")
FINGERPRINT = "9c40fce0752b2b75"


def manifest(**fields: object) -> dict[str, Any]:
    shard = {"file": "train-00000.bin", "num_tokens": 10, "size_bytes": 20, "sha256": "0" * 64}
    split = {"shards": [shard], "num_tokens": 10, "num_bytes": 30, "num_files": 1}
    return {
        "name": "text",
        "fingerprint": "0123456789abcdef",
        "dtype": "uint16",
        "tokenizer": {
            "file": "tokenizer.json", "sha256": "0" * 64, "size_bytes": 9, "vocab_size": 300, "end_of_text_id": 0,
        },
        "train": split,
        "eval": copy.deepcopy(split),
        "unigram_loss": 5.0,
        "source": {},
        "created_s": 1.0,
        **fields,
    }  # fmt: skip


def test_a_fingerprint_is_stable() -> None:
    assert fingerprint(DATA, LISTING) == FINGERPRINT


@pytest.mark.parametrize(
    "other",
    [
        {"format": "jsonl"},
        {"vocab_size": 5000},
        {"eval_fraction": 0.1},
    ],
)
def test_a_fingerprint_follows_what_shapes_the_tokens(other: dict[str, Any]) -> None:
    assert fingerprint(DataSpec(train=DATA.train, **other), LISTING) != FINGERPRINT


@pytest.mark.parametrize(
    "listing", [LISTING[:1], LISTING[::-1], [("a.py", "etag-9", 10), LISTING[1]], [("A.py", "etag-1", 10), LISTING[1]]]
)
def test_a_fingerprint_follows_the_files(listing: list[tuple[str, str, int]]) -> None:
    assert fingerprint(DATA, listing) != FINGERPRINT


def test_a_fingerprint_ignores_what_does_not_shape_the_tokens() -> None:
    assert fingerprint(DataSpec(train="/moved/**", sequence_length=64), LISTING) == FINGERPRINT
    assert fingerprint(DataSpec(train=DATA.train, text_field="body"), LISTING) == FINGERPRINT
    jsonl = DataSpec(train=DATA.train, format="jsonl")
    assert fingerprint(jsonl, LISTING) != fingerprint(jsonl.model_copy(update={"text_field": "body"}), LISTING)


def test_the_held_out_files_are_stable() -> None:
    assert [number for number in range(100) if is_held_out(f"file-{number}.py", 0.05)] == [25, 43, 71, 76, 82]


def test_the_share_held_out_is_about_what_was_asked() -> None:
    held_out = sum(is_held_out(f"package/module_{number}.py", 0.2) for number in range(5000))
    assert 900 < held_out < 1100


def test_a_larger_share_holds_out_the_same_files_and_more() -> None:
    names = [f"{number}.txt" for number in range(1000)]
    small, large = ({name for name in names if is_held_out(name, share)} for share in (0.05, 0.2))
    assert small < large


def test_a_name_that_is_no_text_has_a_place_too() -> None:
    assert is_held_out("caf\udce9.py", 0.5) in (True, False)


def test_a_manifest_is_read_back(memory_store: MemoryStore) -> None:
    memory_store.create_json(layout.dataset_manifest("text", "0123456789abcdef"), manifest())
    found = read_manifest(memory_store, "text", "0123456789abcdef")
    assert (found.num_samples(found.train, 3), found.num_samples(found.train, 9)) == (3, 1)
    assert (found.num_samples(found.train, 10), found.num_samples(found.train, 100)) == (0, 0)


LIES: list[dict[str, Any]] = [
    {"format": "headway/dataset/2"},
    {"extra": 1},
    {"dtype": "uint32"},
    {"train": {**manifest()["train"], "num_tokens": 11}},
    {"train": {**manifest()["train"], "shards": [{**manifest()["train"]["shards"][0], "num_tokens": 11}]}},
    {"eval": None},
]


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(memory_store: MemoryStore, lie: dict[str, Any]) -> None:
    memory_store.create_json(layout.dataset_manifest("text", "f"), manifest(**lie))
    with pytest.raises(IntegrityError, match="headway/dataset/1"):
        read_manifest(memory_store, "text", "f")


def test_of_several_preparations_the_newest_is_meant(memory_store: MemoryStore) -> None:
    for name, created_s in (("aaaa", 1.0), ("bbbb", 3.0), ("cccc", 2.0)):
        document = manifest(fingerprint=name, created_s=created_s)
        memory_store.create_json(layout.dataset_manifest("text", name), document)
    memory_store.create(layout.dataset("text", "dddd") + "train-00000.bin", b"not committed")
    assert find_dataset(memory_store, "text").fingerprint == "bbbb"
    assert find_dataset(memory_store, "text@cccc").fingerprint == "cccc"
    with pytest.raises(SpecError, match="no prepared dataset 'text@dddd'"):
        find_dataset(memory_store, "text@dddd")
    with pytest.raises(NotFound):
        read_manifest(memory_store, "text", "dddd")
