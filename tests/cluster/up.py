"""``make cluster``: builds what is missing, starts the cluster, and says how to use it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import HeadwayError, Interrupted, UsageError
from orchestrator.targets import processes
from orchestrator.targets.seaweedfs import Keys
from tests.cluster import addons, control_plane, credentials, manifests, network, nodes, packages, s3
from tests.cluster.build import build_programs
from tests.cluster.cleanup import end_everything, left_behind
from tests.cluster.description import Cluster, load
from tests.cluster.images import build_images
from tests.cluster.layout import (
    BUCKET,
    DIRECTORY_VARIABLE,
    GPUS_VARIABLE,
    NODES,
    REGION,
    TEST_IMAGE,
    Layout,
    Node,
    find_layout,
)
from tests.cluster.lock import only_one
from tests.cluster.started import Started

_READY_TIMEOUT_S = 90.0
_READ_LOGS = f"Read what is in logs/ of the cluster's directory (~/.cache/headway-cluster, or {DIRECTORY_VARIABLE})"


@dataclass(kw_only=True)
class Times:
    """How long each part of a start took, in seconds since the start."""

    started_at: float = field(default_factory=time.monotonic)
    parts: list[tuple[str, float]] = field(default_factory=list)

    def done(self, part: str) -> None:
        self.parts.append((part, time.monotonic() - self.started_at))

    def shown(self) -> str:
        return "\n".join(f"  {seconds:5.1f} s  {part}" for part, seconds in self.parts)


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        layout = find_layout()
        given = os.environ.get("KUBECONFIG")
        if given and Path(given) != layout.kubeconfig:
            print(f"KUBECONFIG is set: the tests use that cluster, and nothing is started.\nexport KUBECONFIG={given}")
            return 0
        with only_one(layout):
            cluster = load(layout)
            if cluster is not None and cluster.is_running() and control_plane.is_ready(layout):
                print("The cluster is up.")
            else:
                cluster = _prepare_and_start(layout)
        print(f"export KUBECONFIG={cluster.kubeconfig}")
    except KeyboardInterrupt:
        print("Interrupted; nothing is left running.", file=sys.stderr)
        return Interrupted.exit_code
    except HeadwayError as e:
        print(f"{e.message}\n  → {e.next_step or _READ_LOGS}", file=sys.stderr)
        return e.exit_code
    return 0


def num_gpus_per_node() -> int:
    """
    Raises:
        UsageError: ``HEADWAY_CLUSTER_GPUS`` is no count.
    """
    given = os.environ.get(GPUS_VARIABLE, "1")
    if not given.isdigit():
        raise UsageError(
            f"{GPUS_VARIABLE} is {given!r}; it is how many GPUs each node claims to have.",
            next_step="Give a whole number, 0 or more",
        )
    return int(given)


def _prepare_and_start(layout: Layout) -> Cluster:
    num_gpus = num_gpus_per_node()
    packages.install_missing()
    layout.directory.mkdir(parents=True, exist_ok=True)
    build_programs(layout)
    manifests.render_upstream(layout)
    build_images(layout)
    if left_behind(layout):
        print("Ending what an earlier start left", flush=True)
        end_everything(layout)
    shutil.rmtree(layout.logs, ignore_errors=True)
    started = Started(layout=layout)
    times = Times()
    pool = ThreadPoolExecutor(max_workers=8)
    try:
        cluster = _start(started, pool, times, num_gpus=num_gpus)
    except BaseException:
        with processes.uninterrupted():
            started.stopping.set()
            end_everything(layout)
            # Threads that waited for what has just ended may have made something meanwhile.
            pool.shutdown(wait=True, cancel_futures=True)
            end_everything(layout)
        raise
    pool.shutdown()
    print(f"The cluster is up; ready after\n{times.shown()}")
    return cluster


def _start(started: Started, pool: ThreadPoolExecutor, times: Times, *, num_gpus: int) -> Cluster:
    layout = started.layout
    layout.run.mkdir(parents=True, exist_ok=True)
    layout.run.chmod(0o700)
    network.make_network(layout)
    credentials.write_credentials(layout)
    times.done("network and certificates")
    containerds = {node: pool.submit(nodes.start_containerd, started, node) for node in NODES}
    keys = pool.submit(_start_s3, started, list(containerds.values()), times)
    control_plane.start_control_plane(started)
    times.done("API server")
    parts = [
        pool.submit(_apply, layout, times, name, objects) for name, objects in manifests.all_addons(layout).items()
    ]
    for node in NODES:
        parts.append(pool.submit(_start_node, started, node, containerds[node], times, num_gpus))
    _all_of([*parts, *containerds.values(), keys])
    deployments = (
        ("kube-system", "coredns"),
        (manifests.KUBERAY_NAMESPACE, "kuberay-operator"),
        (manifests.KUEUE_NAMESPACE, "kueue-controller-manager"),
    )
    available = [pool.submit(_wait_for_deployment, layout, times, *each) for each in deployments]
    _all_of(available)
    _until(started, "Kueue's webhook", lambda: addons.kueue_answers(layout))
    times.done("Kueue's webhook answers")
    _until(started, "DNS", addons.dns_answers)
    times.done("DNS answers")
    return _describe(started, keys.result())


def _start_node(started: Started, node: Node, containerd: Future[None], times: Times, num_gpus: int) -> None:
    layout = started.layout
    containerd.result()
    nodes.start_kubelet(started, node)
    addons.wait_for_node(layout, node.name)
    addons.register_gpus(layout, node.name, num_gpus)
    nodes.start_network_agents(started, node)
    addons.wait_until_node_ready(layout, node.name)
    times.done(f"{node.name} ready")


def _apply(layout: Layout, times: Times, name: str, objects: Sequence[manifests.Manifest]) -> None:
    addons.apply(layout, objects)
    times.done(f"{name} applied")


def _wait_for_deployment(layout: Layout, times: Times, namespace: str, name: str) -> None:
    addons.wait_for_deployment(layout, namespace, name)
    times.done(f"{name} available")


def _until(started: Started, what: str, ready: Callable[[], bool]) -> None:
    if not processes.wait_until(ready, timeout_s=_READY_TIMEOUT_S, ended=started.stopping.is_set):
        raise HeadwayError(f"{what} did not answer within {_READY_TIMEOUT_S:.0f} s.")


def _start_s3(started: Started, containerds: Sequence[Future[None]], times: Times) -> dict[str, Keys]:
    # Not while images are imported: on a busy disk SeaweedFS loses the first volume that it makes.
    _all_of(containerds)
    times.done("images")
    keys = s3.start_s3(started)
    times.done("S3 server")
    return keys


def _all_of(futures: Sequence[Future[Any]]) -> None:
    """Wait for all, or for the first that fails, and raise its error."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for each in done:
        each.result()


def _describe(started: Started, keys: dict[str, Keys]) -> Cluster:
    layout = started.layout
    cluster = Cluster(
        kubeconfig=str(layout.kubeconfig),
        kubectl=layout.program("kubectl"),
        api_server=credentials.API_URL,
        nodes=[node.name for node in NODES],
        image=TEST_IMAGE,
        s3_endpoint_url=s3.ENDPOINT_URL,
        s3_region=REGION,
        s3_bucket=BUCKET,
        s3_keys=keys,
        processes=started.identities(),
    )
    cluster.save(layout.description)
    return cluster


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
