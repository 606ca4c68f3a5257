"""A node that is announced to be taken away, on a Ray cluster of two nodes: Ray's own drain, with a deadline."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.record import EventReader
from orchestrator.spec import ResourcesSpec, Workers
from orchestrator.store import Attempt, Store
from orchestrator.store.attempts import request_stop
from orchestrator.targets import processes
from tests.command_line import BIN
from tests.integration.training import make_dataset, make_job, make_spec
from workloads.cluster import fit
from workloads.train import TrainJob

DEADLINE_S = 60
WAIT_S = DEADLINE_S + 180.0
NEVER = 1_000_000  # steps between the checkpoints that are due without a notice


@pytest.fixture
def cluster(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each. Comes after the store, whose variables the nodes inherit."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level=logging.WARNING)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def drain(cluster: Any) -> str:
    """Announce that the node which is not the head will be taken away. Returns its id."""
    (node,) = cluster.worker_nodes
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    where = ["--address", cluster.address, "--node-id", node.node_id]
    deadline = ["--deadline-remaining-seconds", str(DEADLINE_S)]
    subprocess.run([str(BIN / "ray"), "drain-node", *where, *reason, *deadline], check=True, capture_output=True)
    return str(node.node_id)


def events(store: Store, run_id: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(store, run_id).poll() if event["kind"] == kind]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    assert processes.wait_until(condition, timeout_s=WAIT_S, ended=lambda: False), what


@pytest.mark.full
def test_a_preemption_notice_is_one_checkpoint_and_the_run_goes_on_without_the_node(store: Store, cluster: Any) -> None:
    make_dataset(store)
    resources = ResourcesSpec(workers=Workers(min=1, max=2), max_failures=0)
    spec = make_spec(stage=2, every_steps=NEVER).model_copy(update={"resources": resources})
    run_id = "tiny-00000001"
    job, attempt = make_job(store, spec, run_id, total_steps=NEVER)

    def bad_day() -> str:
        try:
            wait_for(lambda: bool(events(store, run_id, "step")), "the first step")
            node = drain(cluster)
            wait_for(lambda: len(events(store, run_id, "training")) == 2, "the next group")
            return node
        finally:
            stop(store, attempt)

    hangs: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        day = pool.submit(bad_day)
        fit(TrainJob.model_validate(job), run_id, say=hangs.append, note=lambda *_, **__: None)
        node = day.result()

    (notice,) = events(store, run_id, "preemption")
    assert notice["nodes"] == [node]
    first, second = events(store, run_id, "training")
    assert (first["world_size"], second["world_size"]) == (2, 1)
    saved, at_the_stop = sorted(event["step"] for event in events(store, run_id, "checkpoint"))
    assert second["first_step"] == saved > 0, "resumed from the checkpoint that the notice brought"
    before = [event["step"] for event in events(store, run_id, "step") if event["time_s"] < second["time_s"]]
    assert max(before) > saved, "training went on until the deadline"
    assert committed_steps(store, run_id) == [at_the_stop, saved]
    assert hangs == []


def stop(store: Store, attempt: Attempt) -> None:
    request_stop(store, attempt.run_id, attempt.number, reason="the test is over")
