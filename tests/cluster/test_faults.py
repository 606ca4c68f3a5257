"""A worker process, a worker pod and the head, lost one after the other in one run of the demo's run file.

It ends done, with the losses of the unbroken run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.spec import load
from orchestrator.store.attempts import newest_attempt
from orchestrator.store.s3 import split_uri
from tests.cluster.installed import Installed
from tests.cluster.layout import NAMESPACE
from tests.cluster.runs import STEPS, Submitted, submit

pytestmark = pytest.mark.full

EVERY = 20


@pytest.fixture(scope="module")
def broken(cluster: Installed, directory: Path, prefix: str, road: Submitted) -> Iterator[Submitted]:
    road.finish().assert_done()
    # It has the GPUs until then, and of two stores only one may have a RayJob of a name under way.
    road.wait_until_gone()
    with submit(cluster, directory, f"{prefix}/broken") as submitted:
        yield submitted


def kill_worker_process(run: Submitted) -> None:
    pod = run.pods("worker")[0]["metadata"]["name"]
    kill = "kill -9 $(pgrep -f '^ray::RayTrainWorker|^ray::_RayTrainWorker' | head -1)"
    run.cluster.kubectl("-n", NAMESPACE, "exec", pod, "-c", "ray", "--", "bash", "-c", kill)


def delete_worker_pod(run: Submitted) -> None:
    pod = run.pods("worker")[-1]["metadata"]["name"]
    # Without its grace, in which it would train on, and this run is short.
    run.cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod, "--force", "--grace-period=0", "--wait=false")


def delete_head_pod(run: Submitted) -> None:
    (head,) = run.pods("head")
    run.cluster.kubectl("-n", NAMESPACE, "delete", "pod", head["metadata"]["name"], "--wait=false")


def test_a_killed_worker_process(broken: Submitted) -> None:
    broken.wait_for_step(EVERY + 2, group=1)
    kill_worker_process(broken)
    broken.wait_for_step(2 * EVERY + 2, group=2)
    assert broken.events("training")[1]["first_step"] >= EVERY


def test_a_deleted_worker_pod(broken: Submitted) -> None:
    started = len(broken.events("training"))
    delete_worker_pod(broken)
    broken.wait_for_step(3 * EVERY + 2, group=started + 1)
    assert broken.events("training")[-1]["first_step"] >= 2 * EVERY
    assert newest_attempt(broken.store, broken.run_id) == 1


@contextmanager
def grown_source(run: Submitted, directory: Path) -> Iterator[None]:
    """With one more file where the run's data came from."""
    bucket, folder = split_uri((load(directory / "run.yaml").data.train or "").partition("*")[0])
    place, late = run.store.at(bucket), f"{folder}/late.py"
    place.upload(late, b"late = True\n")
    try:
        yield
    finally:
        place.delete([late])


def test_a_deleted_head_pod_and_a_source_that_has_grown(broken: Submitted, directory: Path) -> None:
    started = len(broken.events("training"))
    with grown_source(broken, directory):
        delete_head_pod(broken)
        broken.wait_for_step(STEPS - EVERY, group=started + 1)
    assert len(list(broken.store.list_folders("runs/"))) == 1
    assert broken.events("training")[-1]["first_step"] >= 3 * EVERY
    assert newest_attempt(broken.store, broken.run_id) == 2


def test_the_run_ends_done_with_the_losses_of_the_unbroken_one(broken: Submitted, road: Submitted) -> None:
    said = broken.finish().assert_done()
    assert "is done" in said.out
    assert len(broken.ray_jobs()) == 1
    road.finish().assert_done()
    assert broken.losses() == pytest.approx(road.losses(), rel=1e-3)
