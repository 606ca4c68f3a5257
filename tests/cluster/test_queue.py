"""Small runs that wait, and runs that end in ways that no retry changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.store.attempts import newest_attempt
from orchestrator.targets import processes
from tests.cluster.installed import Installed
from tests.cluster.layout import NAMESPACE
from tests.cluster.runs import Submitted, open_store_with, submit
from tests.command_line import headway

TIMEOUT_S = 180.0


SMALL = {
    "apiVersion": "headway/v1",
    "model": {"architecture": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }},
    "data": {"vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32},
    "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 8, "optimizer": {"learning_rate": 1e-3}},
    "resources": {"workers": {"min": 2, "max": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def small_prefix(prefix: str) -> str:
    return f"{prefix}/small"


@pytest.fixture(scope="module")
def source(cluster: Installed, small_prefix: str) -> str:
    store = open_store_with(cluster.settings(f"demo/{small_prefix}"))  # where the trainer may read data
    for number in range(12):
        text = " ".join(f"{number * 7 + each % 53:x}" for each in range(1000))
        store.upload(f"{number:02d}.txt", text.encode())
    return f"{store.uri}/*.txt"


def working_directory(cluster: Installed, folder: Path, name: str, source: str, **changes: dict[str, Any]) -> Path:
    """With a run file of these fields over :data:`SMALL`, two levels deep."""
    folder = folder / name
    folder.mkdir()
    document = {**SMALL, "name": name}
    for part, fields in {"data": {"train": source}, **changes}.items():
        document[part] = {**document.get(part, {}), **fields}
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    cluster.write_target(folder)
    return folder


@pytest.fixture(scope="module")
def refused_and_not_finite(
    cluster: Installed, source: str, small_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Submitted, Submitted]]:
    folder = tmp_path_factory.mktemp("small")
    first = working_directory(cluster, folder, "refused", source, gate={"max_loss": 0.1})
    second = working_directory(
        cluster, folder, "not-finite", source, train={**SMALL["train"], "optimizer": {"learning_rate": 1e30}}
    )
    with (
        submit(cluster, first, small_prefix, name="refused") as refused,
        submit(cluster, second, small_prefix, name="not-finite") as not_finite,
    ):
        yield refused, not_finite


@pytest.mark.full
def test_of_two_runs_that_need_all_gpus_one_starts_and_the_other_says_why_it_waits(
    cluster: Installed, refused_and_not_finite: tuple[Submitted, Submitted], small_prefix: str
) -> None:
    runs = {run.name: run for run in refused_and_not_finite}
    ours = lambda: [job for job in cluster.objects("rayjobs") if job["metadata"]["name"].startswith(tuple(runs))]  # noqa: E731
    assert processes.wait_until(lambda: len(ours()) == 2, timeout_s=TIMEOUT_S, ended=lambda: False)
    running = lambda: [job for job in ours() if not job["spec"].get("suspend")]  # noqa: E731
    assert processes.wait_until(lambda: len(running()) == 1, timeout_s=TIMEOUT_S, ended=lambda: False)
    (waiting,) = [job["metadata"]["name"] for job in ours() if job["spec"].get("suspend")]
    held = next(run for name, run in runs.items() if waiting.startswith(name))
    held.wait_for_line("waiting: queued in headway, place ", "insufficient unused quota for nvidia.com/gpu")
    pods = cluster.objects("pods", f"headway.dev/component=trainer,ray.io/cluster={waiting}")
    assert pods == [], "it holds nothing while it waits"
    place = open_store_with(cluster.settings(f"demo/{small_prefix}"))
    place.upload("late.txt", b"a file that the waiting run was not submitted with")


@pytest.mark.full  # these two are one story: what the first leaves in the queue ends in the second
def test_a_gate_refusal_and_a_loss_that_is_not_finite_start_no_second_cluster(
    cluster: Installed, refused_and_not_finite: tuple[Submitted, Submitted]
) -> None:
    refused, not_finite = refused_and_not_finite
    said = refused.finish()
    assert (said.code, "was refused by the gate" in said.err) == (3, True), said.err
    said = not_finite.finish()
    assert (said.code, "failed for good: The loss became " in said.err) == (1, True), said.err
    for run in refused_and_not_finite:
        assert "listing is not kept" not in run.err
        run.wait_until_gone()  # the outcome is in the store, and seen, before KubeRay has heard of its end
        (job,) = run.ray_jobs()
        status = job["status"]
        assert (status["jobDeploymentStatus"], status["jobStatus"]) == ("Complete", "SUCCEEDED")
        assert status.get("failed", 0) == 0
        assert newest_attempt(run.store, run.run_id) == 1


# -- what keeps a run from starting


def test_an_image_of_another_version_is_refused_and_gives_its_place_back(
    cluster: Installed, directory: Path, source: str, small_prefix: str, tmp_path: Path
) -> None:
    folder = working_directory(cluster, tmp_path, "another-version", source)
    settings = cluster.settings(small_prefix)
    plan = headway("plan", "run.yaml", "--target", "kubernetes", "--manifests", directory=folder, settings=settings)
    manifest = json.loads(plan.assert_done().out.replace("0.1.0", "9.9.9"))
    cluster.apply(manifest)
    with submit(cluster, folder, small_prefix, name="another-version") as run:
        said = run.finish()
    assert said.code == 4, said.err
    assert "This image holds Headway 0.1.0, and the run was submitted by Headway 9.9.9" in said.err
    name = manifest["metadata"]["name"]
    gone = lambda: name not in {job["metadata"]["name"] for job in cluster.objects("rayjobs")}  # noqa: E731
    assert processes.wait_until(gone, timeout_s=TIMEOUT_S, ended=lambda: False)


def test_a_missing_secret_is_named_and_a_stop_gives_the_place_back(
    cluster: Installed, source: str, small_prefix: str, tmp_path: Path
) -> None:
    folder = working_directory(cluster, tmp_path, "no-secret", source)
    document = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**document, "secrets": ["nowhere"]}))
    with submit(cluster, folder, small_prefix, name="no-secret") as run:
        run.wait_for_line("waiting: ", "CreateContainerConfigError", "nowhere")
        (job,) = [job for job in cluster.objects("rayjobs") if job["metadata"]["name"].startswith("no-secret-")]
        cluster.kubectl("-n", NAMESPACE, "delete", "rayjob", job["metadata"]["name"], "--wait=false")
        said = run.finish()
    assert said.code in (1, 130), said.err  # gone at once, or its pods are still being ended
    assert "its job was stopped" in said.err or "no longer knows its job" in said.err
