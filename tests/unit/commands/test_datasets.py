"""``headway list``, ``verify`` and ``show`` of datasets: whole ones, damaged ones, and what a name means."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.commands.list_datasets import dataset_words, list_datasets
from orchestrator.commands.locate import find_named_dataset
from orchestrator.commands.show_dataset import dataset_facts, dataset_lines, named_dataset
from orchestrator.commands.text import lines, table
from orchestrator.commands.verify_dataset import recorded_files, verify_dataset
from orchestrator.errors import IntegrityError, UsageError
from orchestrator.reporter import Reporter
from orchestrator.store import layout
from tests.unit.commands.datasets import FINGERPRINT, NAME, REFERENCE, put_dataset
from tests.unit.fakes import MemoryStore

OTHER = FINGERPRINT[::-1]
PREFIX = layout.dataset(NAME, FINGERPRINT)


# -- the list


def test_the_newest_is_first(memory_store: MemoryStore) -> None:
    put_dataset(memory_store)
    source = {"pattern": "/data/*.jsonl", "num_files": 7, "num_bad_records": 3}
    put_dataset(memory_store, fingerprint=OTHER, created_s=1_000_000_060.0, source=source)
    newest, oldest = list_datasets(memory_store)
    assert oldest == {
        "dataset": REFERENCE,
        "created_s": 1_000_000_000.0,
        "train_tokens": 200,
        "eval_tokens": 100,
        "samples": "stream",
        "vocabulary": 300,
        "num_files": 4,
        "num_bad_records": 0,
        "size_bytes": 600,
        "source": "s3://corpus/**",
        "problem": None,
    }
    assert (newest["dataset"], newest["num_bad_records"]) == (f"{NAME}@{OTHER}", 3)
    assert dataset_words(newest)["created"] == "2001-09-09 01:47 UTC"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is not JSON"), (b"[]", "has the format None"), (b'{"format": "headway/dataset/1"}', "headway/dataset/1")],
)
def test_one_that_cannot_be_read_is_a_row_that_says_why(memory_store: MemoryStore, content: bytes, words: str) -> None:
    put_dataset(memory_store)
    memory_store.create(layout.dataset_manifest(NAME, OTHER), content)
    memory_store.create(layout.dataset(NAME, "fedcba9876543210") + "train-00000.bin", b"being made")
    good, bad = list_datasets(memory_store)
    assert (good["dataset"], good["problem"]) == (REFERENCE, None)
    assert bad["dataset"] == f"{NAME}@{OTHER}"
    assert words in bad["problem"]
    assert f"not readable: {bad['problem']}" in table([dataset_words(row) for row in (good, bad)])


# -- what a name means


def test_a_dataset_by_its_names(memory_store: MemoryStore) -> None:
    older = put_dataset(memory_store)
    newer = put_dataset(memory_store, fingerprint=OTHER, created_s=older.created_s + 1)
    assert find_named_dataset(memory_store, REFERENCE) == older
    assert find_named_dataset(memory_store, NAME) == newer
    for name in (f"{NAME}@12", "other", "run-1a2b3c4d@12/00001-00001-abc"):
        assert find_named_dataset(memory_store, name) is None
    with pytest.raises(UsageError, match=f"There is no dataset other@{FINGERPRINT}"):
        find_named_dataset(memory_store, f"other@{FINGERPRINT}")


def test_a_bare_name_is_a_runs_first(memory_store: MemoryStore) -> None:
    put_dataset(memory_store)
    memory_store.create_json(layout.run_spec(f"{NAME}-00000001"), {})
    assert find_named_dataset(memory_store, NAME) is None
    assert find_named_dataset(memory_store, REFERENCE) is not None


def test_a_manifest_of_another_dataset_is_refused(memory_store: MemoryStore) -> None:
    put_dataset(memory_store)
    memory_store.create(
        layout.dataset_manifest("copy", FINGERPRINT), memory_store.get(layout.dataset_manifest(NAME, FINGERPRINT))
    )
    with pytest.raises(IntegrityError, match=f"is the manifest of {REFERENCE}"):
        named_dataset(memory_store, f"copy@{FINGERPRINT}")


def test_what_is_shown_of_one(memory_store: MemoryStore) -> None:
    facts = dataset_facts(put_dataset(memory_store))
    assert facts["splits"]["train"] == {
        "num_shards": 2, "num_tokens": 200, "num_bytes": 300, "num_files": 1, "num_targets": None,
    }  # fmt: skip
    assert facts["tokenizer"]["files"] == ["tokenizer.json", "chat_template.jinja"]
    assert facts["lineage"] == {"num_parts": 1, "code_version": "0.1.0", "settings": "0" * 64, "reused": None}
    text = lines(dataset_lines(facts))
    assert f"dataset: {REFERENCE}\n" in text
    assert "pattern: s3://corpus/**" in text
    assert "classes" not in text


# -- verifying


def damaged(store: MemoryStore, *, file: str, change: Callable[[bytes], bytes] | None) -> dict[str, list[str]]:
    """What verifying says of a dataset with one file changed, or deleted."""
    manifest = put_dataset(store)
    if change is None:
        store.delete([PREFIX + file])
    else:
        store.tamper(PREFIX + file, change(store.get(PREFIX + file)))
    with pytest.raises(IntegrityError, match=f"1 of the 6 files of {REFERENCE} are damaged: {file}") as caught:
        verify_dataset(store, manifest, Reporter())
    found = caught.value.facts["damaged"]
    assert isinstance(found, dict)
    return found


def flipped(*places: int) -> Callable[[bytes], bytes]:
    return lambda data: bytes(byte ^ (1 if place in places else 0) for place, byte in enumerate(data))


def test_a_whole_one_is_verified(memory_store: MemoryStore) -> None:
    manifest = put_dataset(memory_store)
    facts, text = verify_dataset(memory_store, manifest, Reporter())
    assert facts["verified"] == {
        "tokenizer.json": 100, "chat_template.jinja": 14, "parts/00000.json": 14,
        "train-00000.bin": 200, "train-00001.bin": 200, "eval-00000.bin": 200,
    }  # fmt: skip
    assert text.startswith(f"{REFERENCE}: all 6 files verified")
    assert {file.key for file in recorded_files(manifest)} == memory_store.objects.keys() - {PREFIX + "manifest.json"}


SHARD = "train-00001.bin"


@pytest.mark.parametrize(
    ("file", "change", "faults"),
    [
        (SHARD, flipped(64), ["piece 1 (bytes 64 to 127) does not match its digest"]),
        (
            SHARD,
            flipped(0, 199),
            [
                "piece 0 (bytes 0 to 63) does not match its digest",
                "piece 3 (bytes 192 to 199) does not match its digest",
            ],
        ),
        (SHARD, lambda data: data + b"more", ["it is larger than recorded: 204 bytes, not 200"]),
        (
            SHARD,
            lambda data: data[:130],
            ["it is smaller than recorded: 130 bytes, not 200", "it ends in piece 2 of 4, 130 bytes from its start"],
        ),
        (
            SHARD,
            lambda _: b"",
            ["it is smaller than recorded: 0 bytes, not 200", "it ends in piece 0 of 4, 0 bytes from its start"],
        ),
        (SHARD, None, ["it is missing"]),
        ("tokenizer.json", flipped(50), ["it does not match its digest"]),
        ("chat_template.jinja", None, ["it is missing"]),
        ("parts/00000.json", flipped(3), ["it does not match its digest"]),
    ],
)
def test_each_damage_is_named(
    memory_store: MemoryStore,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: Callable[[bytes], bytes] | None,
    faults: list[str],
) -> None:
    assert damaged(memory_store, file=file, change=change) == {file: faults}
    assert capsys.readouterr().err.splitlines() == [f"{REFERENCE}/{file}: damaged: {fault}" for fault in faults]


def test_all_that_is_damaged_is_told(memory_store: MemoryStore) -> None:
    manifest = put_dataset(memory_store)
    for file in ("train-00000.bin", "eval-00000.bin"):
        memory_store.tamper(PREFIX + file, b"other")
    with pytest.raises(IntegrityError, match=r"2 of the 6 files .*: train-00000\.bin, eval-00000\.bin\.") as caught:
        verify_dataset(memory_store, manifest, Reporter())
    assert "headway prepare" in caught.value.next_step
