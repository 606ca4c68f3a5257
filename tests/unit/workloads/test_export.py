"""The pipeline's export where no cluster is needed: what a person can still change is no end of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.checkpoint.export import ExportedFile, export_to_store, plan_files
from orchestrator.checkpoint.sources import open_weights
from orchestrator.errors import AttemptFailed, SpecError
from orchestrator.spec import RunSpec, parse
from orchestrator.starter import STARTER
from orchestrator.store import layout
from tests.unit.checkpoint.saving import RUN, SHAPES, manifest_at, new_group, save
from tests.unit.checkpoint.states import random_values
from tests.unit.fakes import MemoryStore
from workloads.export import export, save_assets
from workloads.export_file import FileJob

NONE: Any = None


def starter_spec(**changes: Any) -> RunSpec:
    return parse({**yaml.safe_load(STARTER), **changes})


def test_weights_beyond_fp16_fail_the_attempt_and_not_the_run(memory_store: MemoryStore) -> None:
    values = random_values(SHAPES)
    values["bias"]["fp32"][1] = 1e6
    group = new_group(memory_store)
    save(memory_store, group, 4, values=values)
    weights = open_weights(memory_store, *manifest_at(memory_store, 4))

    def write_all(jobs: Sequence[FileJob]) -> list[ExportedFile]:
        files = plan_files(weights.manifest, dtype=jobs[0].dtype, max_shard_bytes=jobs[0].max_shard_bytes)
        return [export_to_store(weights, file, memory_store, jobs[0].prefix) for file in files]

    spec = starter_spec(export={"dtype": "fp16"}, release=None)
    with pytest.raises(AttemptFailed, match=r"bias holds 1e\+06") as caught:
        export(spec, memory_store, group.attempt, NONE, NONE, step=4, write_all=write_all)
    assert "export.dtype" in caught.value.next_step


@pytest.mark.parametrize("facts", [{}, [], {"spec": {"name": "of another version"}, "dataset_fingerprint": "0"}])
def test_a_run_file_of_another_version_is_named(memory_store: MemoryStore, tmp_path: Path, facts: Any) -> None:
    memory_store.create_json(layout.run_spec(RUN), facts)
    with pytest.raises(SpecError, match=r"spec\.json is not a run file of this version"):
        save_assets(memory_store, RUN, tmp_path, dtype="fp32")
