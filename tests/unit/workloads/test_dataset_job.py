"""``headway prepare --here``, as far as it comes without Ray: a dataset that exists, and mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from orchestrator.commands.prepare import find_wanted
from orchestrator.commands.prepare_here import prepare_here
from orchestrator.errors import EmptySource, EnvironmentUnusable, SpecError
from orchestrator.reporter import Reporter
from orchestrator.spec import RunSpec, parse
from orchestrator.starter import STARTER
from tests.unit.commands.datasets import put_dataset
from tests.unit.fakes import MemoryStore
from workloads.dataset_job import prepare_dataset


def spec_of(folder: Path) -> RunSpec:
    return parse({**yaml.safe_load(STARTER), "data": {"train": str(folder / "data" / "*.txt")}})


def test_one_that_exists_is_found_without_a_cluster(memory_store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("text")
    spec = spec_of(tmp_path)
    wanted = find_wanted(spec, memory_store, tmp_path)
    standing = put_dataset(memory_store, wanted.name, wanted.fingerprint)
    said: list[str] = []
    assert prepare_dataset(spec, memory_store, working_directory=tmp_path, say=said.append) == standing
    assert [key for key in memory_store.objects if not key.startswith(("probe/", "datasets/"))] == []


def test_a_source_that_names_nothing(memory_store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(EmptySource, match="matches no file"):
        prepare_dataset(spec_of(tmp_path), memory_store, working_directory=tmp_path, say=lambda _: None)


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    path = tmp_path / "run.yaml"
    path.write_text(STARTER)
    return path


def test_what_was_made_is_told(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put_dataset(MemoryStore())
    job = SimpleNamespace(prepare_dataset=lambda *_, **__: made)
    monkeypatch.setitem(sys.modules, "workloads.cluster", SimpleNamespace(connect=lambda _say: "a job"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "workloads.dataset_job", job)  # type: ignore[arg-type]
    facts, text = prepare_here(run_file, "s3://bucket/prefix", Reporter())
    assert (facts["dataset"], facts["train_tokens"]) == (f"{made.name}@{made.fingerprint}", 200)
    assert text.startswith(f"{made.name}@{made.fingerprint} made in ")


def test_an_installation_that_cannot_make_it(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "workloads.cluster", None)
    with pytest.raises(EnvironmentUnusable, match="this installation lacks workloads"):
        prepare_here(run_file, "s3://bucket/prefix", Reporter())


def test_a_mistake_of_the_run_file_is_found_before_all_else(run_file: Path) -> None:
    run_file.write_text(yaml.safe_dump({**yaml.safe_load(STARTER), "data": {"dataset": "text"}}))
    with pytest.raises(SpecError, match="nothing to prepare"):
        prepare_here(run_file, "s3://bucket/prefix", Reporter())
