"""The example of a task of one's own, submitted with nothing but Ray's command line."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import transformers
import yaml

from orchestrator.release.download import download_files
from orchestrator.release.outcome import read_outcome
from orchestrator.release.versions import VersionFile
from orchestrator.store import Store, layout, open_store
from orchestrator.targets.stack import Stack

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "masked-lm"
NUM_FILES, FILE_BYTES = 40, 8_000
STEPS = 6


@pytest.fixture
def working_directory(tmp_path: Path) -> Path:
    """A copy of the example with texts of its own, few steps, and a ``workloads/`` that is not Headway's."""
    copy = tmp_path / "mine"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "workloads").mkdir()
    (copy / "workloads" / "__init__.py").write_text('OWNER = "not Headway"\n')
    (copy / "data").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:NUM_FILES]:
        (copy / "data" / f"{path.stem}.txt").write_bytes(
            path.read_bytes()[:FILE_BYTES].decode(errors="ignore").encode()
        )
    run = yaml.safe_load((copy / "run.yaml").read_text())
    run["data"]["train"] = "data/**/*.txt"
    run["train"] |= {"steps": STEPS, "optimizer": {"learning_rate": 2.0e-3}}
    run["resources"]["workers"] = {"min": 1, "max": 1}  # each worker and evaluation imports torch: seconds of a core
    run["gate"] = {"max_loss": 8.0, "max_eval_samples": 64}
    (copy / "run.yaml").write_text(yaml.safe_dump(run))
    return copy


@pytest.fixture
def stack_store(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in stack.store_environment().items():
        monkeypatch.setenv(name, value)
    return open_store()


def submit(directory: Path, stack: Stack, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    began_s = time.monotonic()
    where = ["--address", stack.dashboard_url, "--working-dir", str(directory)]
    said = subprocess.run(
        ["ray", "job", "submit", *where, "--", "headway", "run", "run.yaml"],
        env={name: environment[name] for name in ("PATH", "HOME") if name in environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(f"submitted and ended in {time.monotonic() - began_s:.1f} s")
    return said


@pytest.mark.full
def test_a_task_from_the_working_directory(
    working_directory: Path, stack: Stack, stack_environment: dict[str, str], stack_store: Store, tmp_path: Path
) -> None:
    first = submit(working_directory, stack, stack_environment)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]

    (run_id,) = [name for name in stack_store.list_folders("runs/") if name.startswith("masked-lm-")]
    outcome = read_outcome(stack_store, run_id)
    assert outcome is not None
    assert (outcome.state, outcome.facts["steps"], "version" in outcome.facts) == ("done", STEPS, False)
    assert 0 < outcome.facts["evaluation"]["loss"] < 8.0

    second = submit(working_directory, stack, stack_environment)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-2000:]
    assert f"{run_id} is done already" in second.stdout
    assert stack_store.exists(layout.attempt(run_id, 1))
    assert not stack_store.exists(layout.attempt(run_id, 2))

    exported = stack_store.get_json(layout.export(run_id))
    files = {name: VersionFile.model_validate(entry) for name, entry in exported["files"].items()}
    directory = tmp_path / "exported"
    download_files(stack_store, exported["prefix"], files, directory)
    fill = transformers.pipeline("fill-mask", model=str(directory))
    assert len(fill(f"import {fill.tokenizer.mask_token}", top_k=3)) == 3
