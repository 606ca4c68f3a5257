"""What has not changed is not tokenized again, and the dataset is the same as if it had been, byte for byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.format import DatasetManifest, PartFile
from orchestrator.spec import DataSpec
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import Here, all_but_manifest, json_lines, long_text, prepare_with, word_tokenizer
from workloads.prepare.reuse import _read

TEXT = DataSpec(train="s3://corpus/**", eval_fraction=0.25, tokenizer="s3://tokenizers/tokenizer.json")
LABELLED = TEXT.model_copy(update={"format": "jsonl", "label_field": "label", "sequence_length": 64})
NUM_FILES = 24

Files = dict[str, bytes]


def text_files() -> Files:
    return {
        f"{number:04d}.txt": long_text(number, 60_000 + 9000 * (number % 9)).encode() for number in range(NUM_FILES)
    }


def label_files() -> Files:
    return {
        f"{number:04d}.jsonl": json_lines(
            [{"text": long_text(100 * number + line, 4000), "label": line % 3} for line in range(60)]
        )
        for number in range(NUM_FILES)
    }


def put(store: MemoryStore, files: Files) -> MemoryStore:
    place = store.at("corpus")
    store.at("tokenizers").upload("tokenizer.json", word_tokenizer())
    place.delete([item.key for item in place.list("") if item.key not in files])
    for name, content in files.items():
        place.upload(name, content)
    return store


def contents(store: MemoryStore, manifest: DatasetManifest) -> Any:
    assert manifest.lineage is not None
    lineage = manifest.lineage.model_copy(update={"reused": None})
    plain = manifest.model_copy(update={"created_s": 0.0, "lineage": lineage})
    return all_but_manifest(store, layout.dataset("here", manifest.fingerprint)), plain


def again(store: MemoryStore, data: DataSpec, files: Files) -> Here:
    """Prepare these files where others were prepared before, and compare with a store where none were."""
    run = Here(put(store, files))
    manifest = prepare_with(store, data, run=run)
    fresh = put(MemoryStore(), files)
    assert contents(store, manifest) == contents(fresh, prepare_with(fresh, data))
    return run


CHANGES = st.dictionaries(st.integers(0, NUM_FILES - 1), st.sampled_from(["gone", "other", "larger"]), max_size=4)


@given(changes=CHANGES, new=st.lists(st.text("abc05", min_size=1, max_size=6), max_size=3, unique=True))
@settings(deadline=None, max_examples=15)
def test_only_what_changed_is_tokenized(changes: dict[int, str], new: list[str]) -> None:
    files = text_files()
    store = put(MemoryStore(), files)
    prepare_with(store, TEXT)
    changed: Files = {f"new-{name}": long_text(7, 50_000).encode() for name in new}
    for number, what in changes.items():
        name = f"{number:04d}.txt"
        before = files.pop(name)
        if what != "gone":
            changed[name] = before[::-1] if what == "other" else before * 3
    run = again(store, TEXT, {**files, **changed})
    assert run.num_tokenized == len(changed)


def test_a_chain_of_changes_takes_from_the_newest() -> None:
    files = text_files()
    store = put(MemoryStore(), files)
    first = prepare_with(store, TEXT)
    files["new.txt"] = long_text(1, 5000).encode()
    assert again(store, TEXT, files).num_tokenized == 1
    files["newer.txt"] = long_text(2, 5000).encode()
    assert again(store, TEXT, files).num_tokenized == 1
    del files["new.txt"], files["newer.txt"]
    run = Here(put(store, files))
    assert prepare_with(store, TEXT, run=run).fingerprint == first.fingerprint
    assert not run.done


@pytest.mark.parametrize("other", [{"clean": False}, {"eval_fraction": 0.3}, {"end_of_text": "w7"}])
def test_other_settings_take_nothing(other: dict[str, Any]) -> None:
    store = put(MemoryStore(), text_files())
    prepare_with(store, TEXT)
    data = TEXT.model_copy(update=other)
    assert again(store, data, text_files()).num_tokenized == NUM_FILES
    limit = TEXT.model_copy(update={"max_bad_records": 0.5})  # changes no token
    assert again(store, limit, {**text_files(), "new.txt": b"w1"}).num_tokenized == 1


def test_what_is_damaged_is_tokenized_again() -> None:
    store = put(MemoryStore(), text_files())
    first = prepare_with(store, TEXT)
    prefix = layout.dataset("here", first.fingerprint)
    shard = store.get(f"{prefix}train-00000.bin")
    store.tamper(f"{prefix}train-00000.bin", bytes([shard[0] ^ 1]) + shard[1:])
    run = again(store, TEXT, {**text_files(), "new.txt": b"w1"})
    assert 1 < run.num_tokenized < NUM_FILES
    store.delete([f"{prefix}{file.file}" for file in first.lineage.parts] if first.lineage is not None else [])
    assert (
        again(store, TEXT, {**text_files(), "newer.txt": b"w1"}).num_tokenized == 1
    )  # the second preparation has them


def test_a_part_of_another_version_of_headway_is_made_anew() -> None:
    content = b'{"format": "headway/part/9"}'
    file = PartFile(
        file="parts/00000.json", sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content), key="k"
    )
    store = MemoryStore()
    store.create("earlier/parts/00000.json", content)
    assert _read(store, "earlier/", file) is None


def test_bad_records_are_counted_and_named_all_the_same() -> None:
    data = TEXT.model_copy(update={"format": "jsonl", "max_bad_records": 0.5})
    files = {f"{number:04d}.jsonl": json_lines([{"text": long_text(number, 9000)}] * 40) for number in range(12)}
    files["0003.jsonl"] = b"no json\n" + files["0003.jsonl"] + b'{"text": 7}\n{"text": null}\n'
    store = put(MemoryStore(), files)
    prepare_with(store, data)
    files["0000.jsonl"] = json_lines([{"text": "w1"}])
    assert again(store, data, files).num_tokenized == 1


def test_whole_parts_of_rows_are_taken() -> None:
    files = label_files()
    store = put(MemoryStore(), files)
    prepare_with(store, LABELLED)
    files["0011.jsonl"] += json.dumps({"text": "w1 w2", "label": 1}).encode()
    run = again(store, LABELLED, files)
    made = [done for done in run.done if getattr(done, "num_slices", 0)]
    assert len([done for done in made if not done.num_reused]) == 1
    assert len(made) > 3


def test_rows_of_other_classes_take_nothing() -> None:
    files = label_files()
    store = put(MemoryStore(), files)
    prepare_with(store, LABELLED)
    files["0011.jsonl"] += json_lines([{"text": f"w{number}", "label": 3} for number in range(40)])
    assert again(store, LABELLED, files).num_tokenized == NUM_FILES
