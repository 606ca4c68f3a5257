"""Fingerprints and the held-out split stay what they are, and a manifest that lies is refused."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest

from orchestrator.dataset.format import DatasetManifest, find_dataset, fingerprint, is_held_out, read_manifest
from orchestrator.dataset.tokenizer import fetch_tokenizer
from orchestrator.errors import IntegrityError, NotFound, SpecError
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore

LISTING = [("a.py", "etag-1", 10), ("b/c.py", "etag-2", 20)]
DATA = DataSpec(train="s3://bucket/**/*.py")
FINGERPRINT = "57533d42ffb0c92e"


def manifest(**fields: object) -> dict[str, Any]:
    shard = {"file": "train-00000.bin", "num_tokens": 10, "size_bytes": 20, "pieces": ["0" * 64]}
    split = {"shards": [shard], "num_tokens": 10, "num_bytes": 30, "num_files": 1}
    return {
        "format": "headway/dataset/2",
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


def of_rows(num_tokens: int) -> dict[str, Any]:
    """Both splits, of 32-bit entries."""
    shard = {"file": "train-00000.bin", "num_tokens": num_tokens, "size_bytes": 4 * num_tokens, "pieces": ["0" * 64]}
    split = {"shards": [shard], "num_tokens": num_tokens, "num_bytes": 30, "num_files": 1, "num_targets": 2}
    return {"train": split, "eval": copy.deepcopy(split)}


def test_a_fingerprint_is_stable() -> None:
    assert fingerprint(DATA, LISTING) == FINGERPRINT


@pytest.mark.parametrize(
    "other",
    [
        {"format": "jsonl"},
        {"vocab_size": 5000},
        {"eval_fraction": 0.1},
        {"clean": False},
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
    assert fingerprint(DataSpec(train=DATA.train, max_bad_records=0.5), LISTING) == FINGERPRINT
    jsonl = DataSpec(train=DATA.train, format="jsonl")
    assert fingerprint(jsonl, LISTING) != fingerprint(jsonl.model_copy(update={"text_field": "body"}), LISTING)


PRETRAINED = "0011223344556677"
MESSAGES = DataSpec(train=DATA.train, format="messages")


def test_a_pretrained_tokenizer_stands_in_for_the_size_of_the_vocabulary() -> None:
    found = fingerprint(DATA, LISTING, PRETRAINED)
    assert found not in (FINGERPRINT, fingerprint(DATA, LISTING, "1" * 16))
    assert fingerprint(DATA.model_copy(update={"vocab_size": 5000}), LISTING, PRETRAINED) == found


@pytest.mark.parametrize(
    "other", [{"sequence_length": 64}, {"long_samples": "skip"}, {"eval_fraction": 0.1}, {"format": "jsonl"}]
)
def test_the_fingerprint_of_conversations_follows_what_shapes_their_rows(other: dict[str, Any]) -> None:
    changed = fingerprint(MESSAGES.model_copy(update=other), LISTING, PRETRAINED)
    assert changed != fingerprint(MESSAGES, LISTING, PRETRAINED)


def test_the_fingerprint_of_labelled_texts_follows_their_fields() -> None:
    def of(**fields: Any) -> str:
        return fingerprint(DataSpec(train=DATA.train, format="jsonl", **fields), LISTING)

    all_of_them = [of(), of(label_field="a"), of(label_field="b"), of(label_field="a", text_field="c")]
    all_of_them += [of(label_field="a", sequence_length=64), of(label_field="a", long_samples="skip")]
    assert len(set(all_of_them)) == len(all_of_them)


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
    {"format": "headway/dataset/1"},
    {"extra": 1},
    {"dtype": "uint32"},
    {"train": {**manifest()["train"], "num_tokens": 11}},
    {"train": {**manifest()["train"], "shards": [{**manifest()["train"]["shards"][0], "num_tokens": 11}]}},
    {"eval": None},
    {"kind": "packed"},
    {"row_tokens": 5},
    {"kind": "packed", "row_tokens": 5},  # uint16
    {"kind": "labelled", "row_tokens": 5, "dtype": "uint32", **of_rows(10)},  # without classes
    {"kind": "packed", "row_tokens": 5, "dtype": "uint32", "classes": ["a"], **of_rows(10)},
    {"kind": "packed", "row_tokens": 4, "dtype": "uint32", **of_rows(10)},
    {"kind": "packed", "row_tokens": 1, "dtype": "uint32", **of_rows(10)},
]


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(memory_store: MemoryStore, lie: dict[str, Any]) -> None:
    memory_store.create_json(layout.dataset_manifest("text", "f"), manifest(**lie))
    with pytest.raises(IntegrityError, match="headway/dataset/2"):
        read_manifest(memory_store, "text", "f")


def test_rows_are_counted_as_samples() -> None:
    found = DatasetManifest.model_validate(manifest(kind="packed", row_tokens=5, dtype="uint32", **of_rows(10)))
    assert found.num_samples(found.train, 4) == 2
    with pytest.raises(SpecError, match="rows were made for 4"):
        found.num_samples(found.train, 5)
    assert found.train.targets_per_byte == pytest.approx(2 / 30)
    stream = DatasetManifest.model_validate(manifest())
    assert stream.train.targets_per_byte == pytest.approx(10 / 30)
    stream.require_length(123)


def test_a_whole_tokenizer_is_fetched(memory_store: MemoryStore, tmp_path: Path) -> None:
    prefix = layout.dataset("text", "0123456789abcdef")
    contents = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{1}", "chat_template.jinja": b"hello"}
    facts = {}
    for name, content in contents.items():
        memory_store.create(prefix + name, content)
        facts[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    main = {"file": "tokenizer.json", **facts.pop("tokenizer.json"), "vocab_size": 3, "end_of_text_id": 0}
    found = DatasetManifest.model_validate(manifest(tokenizer={**main, "files": facts}))
    folder = fetch_tokenizer(memory_store, found, tmp_path / "tokenizer")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    memory_store.tamper(prefix + "chat_template.jinja", b"other")
    with pytest.raises(IntegrityError, match="chat_template"):
        fetch_tokenizer(memory_store, found, tmp_path / "again")
    outside = DatasetManifest.model_validate(
        manifest(tokenizer={**main, "files": {"../x": facts["chat_template.jinja"]}})
    )
    with pytest.raises(IntegrityError, match="outside its folder"):
        fetch_tokenizer(memory_store, outside, tmp_path / "outside")


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
