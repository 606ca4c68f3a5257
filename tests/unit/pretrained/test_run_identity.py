"""A run's id and its dataset's depend on the pretrained model by its contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.runs import RunIdentity, identify
from orchestrator.spec import parse
from tests.unit.fakes import MemoryStore
from tests.unit.pretrained.directories import save_directory, values


@pytest.fixture
def working_directory(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    return tmp_path / "work"


def identity(store: MemoryStore, working_directory: Path, pretrained: Path, **model: Any) -> RunIdentity:
    spec = parse(
        {
            "apiVersion": "headway/v1",
            "name": "tuned",
            "model": {"pretrained": str(pretrained), **model},
            "data": {"train": str(working_directory.parent / "text.txt")},
            "train": {"steps": 1},
        }
    )
    return identify(spec, store, working_directory)


def test_a_base_counts_by_its_contents(memory_store: MemoryStore, tmp_path: Path, working_directory: Path) -> None:
    first = identity(memory_store, working_directory, save_directory(tmp_path / "a"))
    copied = identity(memory_store, working_directory, save_directory(tmp_path / "b"))
    other = identity(memory_store, working_directory, save_directory(tmp_path / "c", values(seed=1)))
    assert first.base is not None
    assert copied.base is not None
    assert (first.run_id, first.dataset_fingerprint) == (copied.run_id, copied.dataset_fingerprint)
    assert first.base.uri != copied.base.uri
    assert other.run_id != first.run_id
    assert other.dataset_fingerprint == first.dataset_fingerprint  # the tokenizer is the same


def test_another_tokenizer_makes_another_dataset(
    memory_store: MemoryStore, tmp_path: Path, working_directory: Path
) -> None:
    path = save_directory(tmp_path / "a")
    first = identity(memory_store, working_directory, path)
    (path / "tokenizer.json").write_bytes(b'{"model": {"other": 1}}')
    assert identity(memory_store, working_directory, path).dataset_fingerprint != first.dataset_fingerprint


def test_trusted_code_makes_another_run(memory_store: MemoryStore, tmp_path: Path, working_directory: Path) -> None:
    path = save_directory(tmp_path / "a")
    plain = identity(memory_store, working_directory, path)
    trusted = identity(memory_store, working_directory, path, trust_remote_code=True)
    assert trusted.run_id != plain.run_id


def test_a_base_that_is_not_there_is_said_before_anything_runs(
    memory_store: MemoryStore, tmp_path: Path, working_directory: Path
) -> None:
    with pytest.raises(SpecError, match=r"model.pretrained: there is nothing at"):
        identity(memory_store, working_directory, tmp_path / "nowhere")
