"""A cluster with Headway on it, for the session. ``make test-cluster`` starts one first."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.commands.demo import RUN_FILE, upload_corpus
from orchestrator.reporter import Reporter
from orchestrator.store import Store
from tests.cluster.installed import Installed, install
from tests.cluster.layout import NAMESPACE
from tests.cluster.runs import STEPS, Submitted, open_store_with, submit
from tests.command_line import headway


@pytest.fixture(scope="session")
def prefix() -> str:
    """Of this session's stores in the bucket, so that no run is known from an earlier session."""
    return f"tests/{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def cluster(prefix: str) -> Iterator[Installed]:
    installed = install()
    try:
        yield installed
    finally:
        for kind in ("rayjobs", "rayservices"):
            for each in installed.objects(kind):
                if prefix in each["metadata"].get("annotations", {}).get("headway.dev/store", ""):
                    installed.kubectl("-n", NAMESPACE, "delete", kind, each["metadata"]["name"], "--wait=false")


@pytest.fixture(scope="session")
def road_store(cluster: Installed, prefix: str) -> Store:
    return open_store_with(cluster.settings(f"{prefix}/road"))


@pytest.fixture(scope="session")
def directory(cluster: Installed, road_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the demo's run file, shorter, and the cluster's ``target.yaml``."""
    folder = tmp_path_factory.mktemp("road")
    cluster.write_target(folder)
    source = upload_corpus(road_store, Reporter())
    text = RUN_FILE.replace("SOURCE", source)
    for before, after in (
        ("steps: 450", f"steps: {STEPS}"),
        ("every_steps: 100", "every_steps: 20"),
        ("max_loss: 5.0", "max_loss: 6.0"),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "run.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def planned(cluster: Installed, directory: Path, prefix: str) -> str:
    """What ``headway plan --manifests`` prints of that run before anything is sent."""
    plan = ("plan", "run.yaml", "--target", "kubernetes", "--manifests")
    return headway(*plan, directory=directory, settings=cluster.settings(f"{prefix}/road")).assert_done().out


@pytest.fixture(scope="session")
def road(cluster: Installed, directory: Path, prefix: str, planned: str) -> Iterator[Submitted]:
    """That run, unbroken."""
    with submit(cluster, directory, f"{prefix}/road") as submitted:
        yield submitted
