"""The road of docs/kubernetes.md: the demo's run file trains on two worker pods, and a RayService answers.

The tests go in order, over one run.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from orchestrator.commands.demo import upload_corpus
from orchestrator.record import EventReader
from orchestrator.release.outcome import read_outcome
from orchestrator.reporter import Reporter
from orchestrator.store import Store
from orchestrator.targets import local, ports, processes
from orchestrator.targets.kubernetes.client import KubernetesClient
from orchestrator.targets.kubernetes.forward import forwarded
from tests.cluster.installed import Installed
from tests.cluster.layout import NAMESPACE
from tests.cluster.runs import STEPS, Submitted, losses_of, open_store_with
from tests.command_line import BIN, Said, environment, headway

LOCAL_TIMEOUT_S, COMMAND_TIMEOUT_S = 500.0, 120.0
PROBE_S, REQUIRED_S = 12.0, 120.0
"""Policies take some seconds to know a new pod, and more on a busy machine."""
PROBE = """
import json, socket, sys, time

left, reached = json.loads(sys.argv[1]), []
deadline = time.monotonic() + float(sys.argv[2])
while left and time.monotonic() < deadline:
    for target in list(left):
        try:
            socket.create_connection(tuple(target), timeout=1).close()
        except OSError:
            continue
        left.remove(target)
        reached.append(target)
    time.sleep(0.5)
print(json.dumps(sorted(reached, key=json.loads(sys.argv[1]).index)))
"""
"""Which of the addresses given can be connected to."""


@pytest.fixture(scope="module")
def local_losses(directory: Path, tmp_path_factory: pytest.TempPathFactory, road: Submitted) -> dict[int, float]:
    """Of the same run file on an embedded stack, by step. The road's run ends first: both have the same CPUs."""
    road.finish().assert_done()
    folder = tmp_path_factory.mktemp("local")
    (folder / "run.yaml").write_text((directory / "run.yaml").read_text())
    seed = secrets.randbits(32)
    dashboard = ports.choose([], taken=[], seed=seed)
    serve = ports.choose([], taken=[dashboard], seed=seed)
    options = local.StackOptions(dashboard_port=dashboard, serve_port=serve, num_cpus=3)
    stack = local.up(folder / ".headway", options, lambda _: None)
    try:
        store = open_store_with({**stack.store_environment(), "HEADWAY_STORE": stack.store})
        upload_corpus(store, Reporter())
        headway("submit", "run.yaml", directory=folder, timeout_s=LOCAL_TIMEOUT_S).assert_done()
        (run_id,) = store.list_folders("runs/")
        return losses_of([event for event in EventReader(store, run_id).poll() if event["kind"] == "step"])
    finally:
        local.down(folder / ".headway", lambda _: None, remove_data=True)


def run(
    cluster: Installed, directory: Path, prefix: str, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S
) -> Said:
    settings = cluster.settings(f"{prefix}/road")
    return headway(*arguments, directory=directory, settings=settings, timeout_s=timeout_s)


def test_the_api_server_takes_what_plan_prints(cluster: Installed, planned: str) -> None:
    checked = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=planned)
    assert json.loads(checked)["kind"] == "RayJob"


def test_what_plan_prints_is_what_submit_sends(cluster: Installed, planned: str, road: Submitted) -> None:
    road.wait_for(lambda: any(road.store.list_folders("runs/")), "the run")
    road.wait_for(lambda: bool(road.ray_jobs()), "the RayJob")
    (sent,) = road.ray_jobs()
    expected = json.loads(planned)
    assert _without_defaults(sent["spec"], expected["spec"]) == expected["spec"]
    assert expected["metadata"]["labels"].items() <= sent["metadata"]["labels"].items()


def _without_defaults(found: Any, sent: Any) -> Any:
    """``found`` without what the API server and Kueue added to it."""
    if isinstance(sent, dict):
        return {key: _without_defaults(found[key], value) for key, value in sent.items()}
    if isinstance(sent, list):
        return [_without_defaults(a, b) for a, b in zip(found, sent, strict=True)]
    return found


def test_it_trains_on_two_nodes(cluster: Installed, road: Submitted) -> None:
    road.wait_for(lambda: bool(road.events("training")), "the training")
    assert [event["world_size"] for event in road.events("training")] == [2]
    workers = road.pods("worker")
    assert len({pod["spec"]["nodeName"] for pod in workers}) == 2
    assert [pod["status"]["phase"] for pod in workers] == ["Running", "Running"]


@pytest.fixture(scope="module")
def head_port(cluster: Installed, road: Submitted) -> Iterator[int]:
    """A port of this machine that leads to the dashboard of the run's head."""
    (head,) = road.pods("head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", cluster.kubeconfig)
        client = KubernetesClient(NAMESPACE)
    with forwarded(client, head["metadata"]["name"], 8265) as port:
        yield port


def test_the_jobs_api_refuses_who_has_no_token_and_takes_rays_own_command_line_with_one(
    cluster: Installed, head_port: int
) -> None:
    url = f"http://127.0.0.1:{head_port}"
    with httpx.Client(base_url=url, trust_env=False) as http:
        assert http.get("/api/jobs/").status_code == 401
        assert http.get("/api/jobs/", headers={"Authorization": "Bearer wrong"}).status_code == 403
    template = "go-template={{.data.auth_token | base64decode}}"
    token = cluster.kubectl("-n", NAMESPACE, "get", "secret", "headway-ray-token", "-o", template)
    listed = subprocess.run(
        [str(BIN / "ray"), "job", "list", "--address", url],
        env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
        capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    assert "headway_run" in listed.stdout


def test_nobody_else_reaches_its_ports(cluster: Installed, road: Submitted) -> None:
    addresses = [pod["status"]["podIP"] for node_type in ("head", "worker") for pod in road.pods(node_type)]
    (head, *workers) = addresses
    targets = [(head, port) for port in (6379, 8265, 10001)] + [(each, 8076) for each in workers]
    targets += [(head, int(port)) for port in _listening(cluster, road)]
    trainer = {"headway.dev/component": "trainer"}
    began_s = time.monotonic()
    allowed = _reached(cluster, NAMESPACE, trainer, targets[:3], patience_s=REQUIRED_S)
    assert allowed == [list(target) for target in targets[:3]], "the check itself"
    patience_s = max(PROBE_S, time.monotonic() - began_s)  # the others try for as long as this took
    probes = {
        "another namespace": ("default", trainer),
        "no label": (NAMESPACE, {}),
        "a server": (NAMESPACE, {"headway.dev/component": "server"}),
    }
    with ThreadPoolExecutor() as pool:
        asked = {
            what: pool.submit(_reached, cluster, *where, targets, patience_s=patience_s)
            for what, where in probes.items()
        }
    reached = {what: each.result() for what, each in asked.items()}
    assert reached == {what: [] for what in reached}


def _listening(cluster: Installed, road: Submitted) -> list[str]:
    """Ports of the head that Ray chose by itself, such as its workers'."""
    (head,) = road.pods("head")
    exec_ss = ("-n", NAMESPACE, "exec", head["metadata"]["name"], "-c", "ray", "--", "cat", "/proc/net/tcp")
    lines = cluster.kubectl(*exec_ss).splitlines()[1:]
    found = {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == "0A"}
    return [str(port) for port in sorted(found) if port > 11000][:4]


def _reached(
    cluster: Installed, namespace: str, labels: dict[str, str], targets: list[tuple[str, int]], *, patience_s: float
) -> list[list[Any]]:
    """Which of these a pod of this namespace with these labels can connect to. It ends once it has reached all."""
    name = f"probe-{secrets.token_hex(3)}"
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 1000,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "probe",
                        "image": cluster.target["image"],
                        "imagePullPolicy": cluster.target.get("image_pull_policy", "IfNotPresent"),
                        "command": [_interpreter(cluster), "-c", PROBE, json.dumps(targets), str(patience_s)],
                        "securityContext": restricted,
                    }
                ],
            },
        }
    )
    try:
        phase = ("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.phase}")
        ended = lambda: cluster.kubectl(*phase) in ("Succeeded", "Failed")  # noqa: E731
        timeout_s = patience_s + COMMAND_TIMEOUT_S
        assert processes.wait_until(ended, timeout_s=timeout_s, ended=lambda: False), "the probe did not end"
        return list(json.loads(cluster.kubectl("-n", namespace, "logs", name)))
    finally:
        cluster.kubectl("-n", namespace, "delete", "pod", name, "--wait=false")


def _interpreter(cluster: Installed) -> str:
    """Without a virtual environment, which other namespaces have no claim of."""
    return f"{sys.base_prefix}/bin/python3" if cluster.target.get("claims") else "python3"


@pytest.mark.timeout(1000)  # the rest of the road's run, and then all of the local one
def test_it_passes_the_gate_and_its_losses_are_those_of_the_local_target(
    road: Submitted, local_losses: dict[int, float]
) -> None:
    said = road.finish().assert_done()
    assert "code-lm@1" in said.out
    found = road.losses()
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(local_losses, rel=1e-6)


def test_the_log_is_there_when_the_pods_are_gone(
    cluster: Installed, directory: Path, prefix: str, road: Submitted
) -> None:
    road.wait_until_gone()
    log = run(cluster, directory, prefix, "logs", "code-lm", "--target", "kubernetes").assert_done().out
    assert "train done in " in log
    assert f"{road.run_id} is done: code-lm@1" in log
    files = run(cluster, directory, prefix, "logs", "code-lm", "--files", "--json").assert_done().json["files"]
    names = {each["file"].rpartition("/")[2] for each in files}
    assert {"raylet.out", "gcs_server.out", "event_JOBS.log"} <= names
    assert any(name.startswith("worker-") for name in names)
    driver = next(each["file"] for each in files if "job-driver" in each["file"])
    assert log.rstrip() in run(cluster, directory, prefix, "logs", "code-lm", "--file", driver).out


def test_a_second_submission_is_told_the_outcome(
    cluster: Installed, directory: Path, prefix: str, road: Submitted
) -> None:
    said = run(cluster, directory, prefix, "submit", "run.yaml", "--target", "kubernetes").assert_done()
    assert "is done already; nothing is sent" in said.err
    assert len(road.ray_jobs()) == 1
    status = run(cluster, directory, prefix, "status", "code-lm", "--target", "kubernetes", "--json").assert_done().json
    assert (status["state"], status["attempts"]) == ("done", 1)


def test_ray_and_kubectl_see_it(cluster: Installed, road: Submitted) -> None:
    table = cluster.kubectl("-n", NAMESPACE, "get", "rayjobs")
    assert road.run_id in table
    assert "SUCCEEDED" in table


def test_the_channel_is_served(
    cluster: Installed, directory: Path, prefix: str, road: Submitted, road_store: Store
) -> None:
    outcome = read_outcome(road_store, road.run_id)
    assert outcome is not None
    run(cluster, directory, prefix, "serve", "code-lm", "--target", "kubernetes", timeout_s=300.0).assert_done()
    pods = cluster.objects("pods", "headway.dev/component=server,ray.io/node-type=worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", cluster.kubeconfig)
        client = KubernetesClient(NAMESPACE)
    with forwarded(client, pods[0]["metadata"]["name"], 8000) as port:
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = api.completions.create(model="code-lm", prompt="def __init__(self", max_tokens=8, temperature=0)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    # Its replica holds a GPU of this cluster, outside of the queue.
    run(cluster, directory, prefix, "serve", "code-lm", "--target", "kubernetes", "--down").assert_done()
    gone = lambda: cluster.objects("pods", "headway.dev/component=server") == []  # noqa: E731
    assert processes.wait_until(gone, timeout_s=COMMAND_TIMEOUT_S, ended=lambda: False), "its pods are left"


def test_the_namespace_refuses_a_pod_with_privileges(cluster: Installed) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "privileged", "namespace": NAMESPACE},
        "spec": {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}]},
    }
    said = cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod), check=False)
    assert 'violates PodSecurity "restricted' in said


@pytest.mark.parametrize("account", ["headway-trainer", "headway-server"])
def test_pods_accounts_may_do_nothing(cluster: Installed, account: str) -> None:
    user = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
    listed = cluster.kubectl("auth", "can-i", "--list", user, "-n", NAMESPACE, "--no-headers")
    rules = [line.split() for line in listed.splitlines()]
    # What every account may: ask about itself, and read which APIs there are.
    own = {"selfsubjectreviews.authentication.k8s.io", "selfsubjectaccessreviews.authorization.k8s.io",
           "selfsubjectrulesreviews.authorization.k8s.io"}  # fmt: skip
    assert {rule[0] for rule in rules if not rule[0].startswith("[")} <= own
    for verb, resource in [
        ("get", "secrets"), ("create", "pods"), ("create", "rayjobs.ray.io"), ("list", "pods"), ("get", "configmaps"),
    ]:  # fmt: skip
        said = cluster.kubectl("auth", "can-i", verb, resource, user, "-n", NAMESPACE, check=False)
        assert not said.startswith("yes"), (verb, resource)
