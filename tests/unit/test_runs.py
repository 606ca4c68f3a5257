"""Which run a job goes on with, when what its run file names has changed since it was submitted."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.dataset.listing import keep_listing, kept_listing
from orchestrator.errors import EmptySource, RunError
from orchestrator.pretrained.source import list_base
from orchestrator.runs import RunIdentity, identify, identity_of
from orchestrator.spec import RunSpec, parse
from orchestrator.starter import STARTER
from orchestrator.store import layout
from tests.unit.commands.datasets import put_dataset
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import save_directory
from workloads.fetch_base import fetch_base
from workloads.marks import record_spec


@pytest.fixture
def corpus(memory_store: MemoryStore) -> MemoryStore:
    """The source's bucket."""
    place = memory_store.at("corpus")
    place.upload("a.txt", b"text")
    return place


def spec_of(data: dict[str, Any], **changes: Any) -> RunSpec:
    return parse({**yaml.safe_load(STARTER), "data": data, **changes})


GROWING = {"train": "s3://corpus/**"}


def begin(spec: RunSpec, store: MemoryStore, folder: Path, *, edition: int = 0) -> RunIdentity:
    """What a first attempt leaves: its record."""
    found = identify(spec, store, folder, edition=edition)
    record_spec(store, spec, found)
    return found


def test_before_anything_is_prepared_a_source_on_disk_has_to_be_as_it_was(
    memory_store: MemoryStore, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    spec = spec_of({"train": f"{tmp_path}/*.txt"})
    begun = identify(spec, memory_store, tmp_path, edition=0)
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0) == begun
    begin(spec, memory_store, tmp_path)
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0) == begun
    (tmp_path / "b.txt").write_text("more")
    with pytest.raises(RunError, match=f"{begun.run_id} cannot be made any more") as caught:
        identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0)
    assert "Submit the run file again" in caught.value.next_step
    (tmp_path / "b.txt").unlink()
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0) == begun


@pytest.mark.parametrize("edition", [0, 2])
def test_a_source_in_s3_may_grow_before_anything_is_prepared(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path, edition: int
) -> None:
    spec = spec_of(GROWING)
    begun = identify(spec, memory_store, tmp_path, edition=edition)
    keep_listing(memory_store, begun.run_id, begun.files)
    corpus.upload("b.txt", b"more")
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=edition) == begun
    grown = identify(spec, memory_store, tmp_path, edition=edition)
    assert grown.run_id != begun.run_id
    keep_listing(memory_store, begun.run_id, grown.files)
    assert kept_listing(memory_store, begun.run_id) == begun.files  # the first one stands


LISTING = gzip.compress(b'[{"uri": "s3://corpus/a.txt"}]')


@pytest.mark.parametrize("damage", [b"", b"no gzip", LISTING[:-3], LISTING[:10] + b"\xff" + LISTING[11:], LISTING])
def test_a_listing_that_cannot_be_read_is_none(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path, damage: bytes
) -> None:
    spec = spec_of(GROWING)
    begun = begin(spec, memory_store, tmp_path)
    memory_store.tamper(layout.run_source(begun.run_id), damage)
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0) == begun


def test_the_listing_of_another_run_is_not_followed(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path
) -> None:
    spec = spec_of(GROWING)
    begun = identify(spec, memory_store, tmp_path, edition=0)
    corpus.upload("b.txt", b"more")
    keep_listing(memory_store, begun.run_id, identify(spec, memory_store, tmp_path, edition=0).files)
    with pytest.raises(RunError, match="cannot be made any more"):
        identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0)


@pytest.mark.parametrize("edition", [0, 2])
def test_a_prepared_dataset_is_the_runs_whatever_its_source_holds_by_now(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path, edition: int
) -> None:
    spec = spec_of(GROWING)
    begun = begin(spec, memory_store, tmp_path, edition=edition)
    dataset = put_dataset(memory_store, spec.name, begun.dataset_fingerprint)
    corpus.upload("b.txt", b"more")
    found = identity_of(begun.run_id, spec, memory_store, tmp_path, edition=edition)
    assert (found.run_id, found.edition, found.dataset) == (begun.run_id, edition, dataset)
    corpus.delete(["a.txt", "b.txt"])
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=edition) == found
    with pytest.raises(EmptySource):
        identify(spec, memory_store, tmp_path, edition=edition)


def test_a_newer_dataset_of_the_name_is_another_runs(memory_store: MemoryStore, tmp_path: Path) -> None:
    first = put_dataset(memory_store, "texts", "a" * 16)
    spec = spec_of({"dataset": "texts"})
    begun = begin(spec, memory_store, tmp_path)
    put_dataset(memory_store, "texts", "b" * 16, created_s=first.created_s + 1)
    assert identify(spec, memory_store, tmp_path, edition=0).run_id != begun.run_id
    assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0).dataset == first


def test_a_copied_base_is_the_runs_whatever_lies_there_by_now(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path
) -> None:
    directory = save_directory(tmp_path / "base")
    spec = spec_of(GROWING, model={"pretrained": str(directory)})
    begun = begin(spec, memory_store, tmp_path)
    put_dataset(memory_store, spec.name, begun.dataset_fingerprint)
    (directory / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(RunError, match="cannot be made any more"):
        identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0)
    (tmp_path / "tokenizer.json").rename(directory / "tokenizer.json")
    copied = fetch_base(list_base(str(directory), memory_store), memory_store)
    (directory / "tokenizer.json").unlink()
    found = identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0)
    assert found.base is not None
    assert found.run_id == begun.run_id
    assert fetch_base(found.base, memory_store) == copied


def test_a_record_that_says_something_else_is_not_followed(
    memory_store: MemoryStore, corpus: MemoryStore, tmp_path: Path
) -> None:
    spec = spec_of(GROWING)
    begun = begin(spec, memory_store, tmp_path)
    put_dataset(memory_store, spec.name, "b" * 16)
    for record in (b'{"dataset_fingerprint": "bbbbbbbbbbbbbbbb"}', b"[]", b"no JSON"):
        memory_store.tamper(layout.run_spec(begun.run_id), record)
        assert identity_of(begun.run_id, spec, memory_store, tmp_path, edition=0) == begun
