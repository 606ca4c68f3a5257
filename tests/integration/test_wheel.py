"""The base package as a stranger installs it: from the wheel, without extras, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from orchestrator.commands.files import init
from orchestrator.store import Store
from tests.tiny_model import release_version, save_model
from tests.unit.checkpoint.saving import RUN, SHAPES, new_group, save
from tests.unit.checkpoint.states import random_values

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")
HEAVY = ("ray", "torch", "deepspeed", "transformers")


@pytest.fixture(scope="module")
def base_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment that holds the base wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = folder / "venv"
    for command in (
        [UV, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT],
        [UV, "venv", "--quiet", "--python", sys.executable, environment],
    ):
        subprocess.run(command, check=True)
    (wheel,) = (folder / "dist").glob("headway-*.whl")
    python = environment / "bin" / "python"
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, wheel], check=True)
    return environment / "bin"


def headway(base_only: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [base_only / "headway", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_it_installs_without_ray_or_torch(base_only: Path) -> None:
    listed = subprocess.run(
        [UV, "pip", "list", "--format", "json", "--python", base_only / "python"],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {package["name"] for package in json.loads(listed.stdout)}
    assert "headway" in names
    assert not names & set(HEAVY)


def test_plan_says_all_but_the_memory(base_only: Path, tmp_path: Path) -> None:
    init(tmp_path / "run.yaml")
    done = headway(base_only, "plan", "run.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["batch"]["world_size"] >= 1
    assert planned["memory"] is None
    assert "pip install 'headway[train]'" in planned["memory_note"]


def test_list_and_show_read_the_store(base_only: Path, store: Store, tmp_path: Path) -> None:
    release_version(store, "tiny", save_model(tmp_path / "model", seed=0))
    listed = headway(base_only, "list", "models", "--store", store.uri, "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert [row["version"] for row in json.loads(listed.stdout)["models"]] == ["tiny@1"]
    shown = headway(base_only, "show", "tiny@1", "--store", store.uri, "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["number"] == 1
    assert headway(base_only, "list", "runs", "--store", store.uri, cwd=tmp_path).returncode == 0


def test_run_says_what_is_missing(base_only: Path, store: Store, tmp_path: Path) -> None:
    init(tmp_path / "run.yaml")
    done = headway(base_only, "run", "run.yaml", "--store", store.uri, cwd=tmp_path)
    assert done.returncode == 4
    assert "headway[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_is_verified_and_exported(base_only: Path, store: Store, tmp_path: Path) -> None:
    group = new_group(store)
    values = random_values(SHAPES)
    save(store, group, 4, values=values)
    verified = headway(base_only, "verify", f"{RUN}@4", "--store", store.uri, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    done = headway(base_only, "export", RUN, "--to", "model", "--dtype", "bf16", "--store", store.uri, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(exported["w"].flatten(), values["w"]["fp32"].to(torch.bfloat16))
