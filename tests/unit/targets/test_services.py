import copy
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.errors import TargetError, TimedOut
from orchestrator.render.ray_service import RayServiceRequest
from orchestrator.targets.kubernetes.services import (
    apply_service,
    delete_service,
    merge_patch,
    progress,
    scaled,
    wait_until_answering,
)

NAME, CLUSTER, APPLICATION = "code-lm-production", "code-lm-production-abcde", "headway-code-lm"
PATH = "/v1/models/code-lm"


def request(replicas=1, **spec):
    return RayServiceRequest(
        name=NAME,
        application=APPLICATION,
        replicas=replicas,
        manifest={
            "kind": "RayService",
            "metadata": {
                "name": NAME,
                "labels": {"app.kubernetes.io/managed-by": "headway"},
                "annotations": {"headway.dev/version": "0.1.0"},
            },
            "spec": {"serveConfigV2": f"replicas {replicas}", **spec},
        },
    )


def service(*, state="RUNNING", message="", ready="True", reason="", pending=False, generation=1, observed=1, **spec):
    applications = {APPLICATION: {"status": state, "message": message}} if state else {}
    current = {"rayClusterName": CLUSTER, "applicationStatuses": applications}
    return {
        "metadata": {
            "name": NAME,
            "generation": generation,
            "labels": {"app.kubernetes.io/managed-by": "headway"},
        },
        "spec": spec or request().manifest["spec"],
        "status": {
            "observedGeneration": observed,
            "conditions": [{"type": "Ready", "status": ready, "reason": reason, "message": f"because {reason}"}],
            "activeServiceStatus": {"rayClusterName": "old"} if pending else current,
            "pendingServiceStatus": current if pending else {},
        },
    }


def pod(name, *, ready=True, node_type="worker", waiting=None):
    container = {"name": "ray", "ready": ready, "state": {"waiting": waiting} if waiting else {"running": {}}}
    return {
        "metadata": {"name": name, "labels": {"ray.io/node-type": node_type}},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [container],
        },
    }


def ray_cluster(replicas):
    group = {"groupName": "replicas", "replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas}
    return {"spec": {"workerGroupSpecs": [{**group, "template": {"spec": {}}}]}}


class FakeCluster:
    """Objects by kind and name. ``steps`` change them, one before each look at the RayService."""

    namespace = "headway"

    def __init__(self, service=None, *, pods=(), replicas=1, steps=(), address=None):
        self.objects = {("rayclusters", CLUSTER): ray_cluster(replicas)}
        if service is not None:
            self.objects["rayservices", NAME] = service
        self.its_pods = list(pods)
        self.steps = list(steps)
        self.address = address
        self.patches = []

    def create(self, plural, manifest):
        key = (plural, manifest["metadata"]["name"])
        if key in self.objects:
            return False
        self.objects[key] = copy.deepcopy(manifest)
        return True

    def get(self, plural, name):
        if plural == "rayservices" and self.steps:
            self.steps.pop(0)(self)
        return copy.deepcopy(self.objects.get((plural, name)))

    def patch(self, plural, name, change):
        self.patches.append((plural, change))
        before = self.objects[plural, name]
        after = merged(before, change)
        if after["spec"] != before["spec"] and plural == "rayservices":
            after["metadata"]["generation"] += 1
        self.objects[plural, name] = after
        return copy.deepcopy(after)

    def delete(self, plural, name):
        return self.objects.pop((plural, name), None) is not None

    def pods(self, selector):
        assert selector == f"ray.io/cluster={CLUSTER}"
        return self.its_pods

    def events(self, name):
        return []

    def forward(self, pod, port):
        assert port == 8000
        if self.address is None:
            raise TargetError(f"Port {port} of pod {pod} cannot be reached.")
        return _Stream(self.address)

    def become(self, **change):
        self.objects["rayservices", NAME] = service(**change)


class _Stream:
    def __init__(self, address):
        self.socket = socket.create_connection(address)

    def fileno(self):
        return self.socket.fileno()

    def pending(self):
        return False

    def receive(self):
        return self.socket.recv(1000) or None

    def send(self, data):
        self.socket.sendall(data)

    def close(self):
        self.socket.close()


def merged(target, change):
    """RFC 7386 as the API applies it."""
    if not isinstance(change, dict):
        return change
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


@pytest.fixture
def endpoint():
    """An endpoint that knows the one model; its address and the paths it was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == PATH else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    asked = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address, asked
        server.shutdown()
        thread.join()


def wait(cluster, *, replicas=1, path=PATH, timeout_s=60.0):
    """Each look takes a second of the fake clock. Returns what was said."""
    said, now = [], [0.0]

    def sleep(seconds):
        now[0] += seconds

    try:
        wait_until_answering(
            cluster,
            request(replicas),
            path=path,
            timeout_s=timeout_s,
            say=said.append,
            sleep=sleep,
            clock=lambda: now[0],
        )
    finally:
        cluster.said = said
    return said


# -- applying


def test_a_service_that_is_not_there_is_created():
    cluster = FakeCluster()
    assert apply_service(cluster, request())
    assert cluster.objects["rayservices", NAME] == request().manifest


def test_the_same_again_changes_nothing():
    cluster = FakeCluster(service())
    assert not apply_service(cluster, request())


def test_other_replicas_change_it_in_place():
    cluster = FakeCluster(service())
    assert apply_service(cluster, request(2))
    assert cluster.objects["rayservices", NAME]["spec"]["serveConfigV2"] == "replicas 2"


def test_what_is_no_longer_asked_for_goes():
    cluster = FakeCluster(service(serveConfigV2="replicas 1", rayClusterConfig={"a": {"old": 1, "kept": 2}}))
    assert apply_service(cluster, request(rayClusterConfig={"a": {"kept": 2}}))
    assert cluster.objects["rayservices", NAME]["spec"]["rayClusterConfig"] == {"a": {"kept": 2}}


def test_anothers_service_is_left_alone():
    theirs = service()
    theirs["metadata"]["labels"] = {}
    cluster = FakeCluster(theirs)
    with pytest.raises(TargetError, match="that Headway did not create"):
        apply_service(cluster, request())
    assert cluster.patches == []


def test_a_service_on_its_way_out_is_waited_for_by_a_person():
    leaving = service()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(TargetError, match=r"is being deleted\. Wait until it is gone"):
        apply_service(FakeCluster(leaving), request())


def test_deleting_says_whether_there_was_one():
    cluster = FakeCluster(service())
    assert delete_service(cluster, NAME)
    assert not delete_service(cluster, NAME)


@pytest.mark.parametrize(
    ("current", "wanted"),
    [
        ({"a": 1}, {"a": 1}),
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}}),
        ({"a": [{"x": 1, "y": 2}]}, {"a": [{"x": 1}]}),
        ({"a": {"b": 1}}, {"a": 2}),
        ({"a": 2}, {"a": {"b": {"c": 1}}}),
        ({}, {"a": {}}),
    ],
)
def test_the_patch_makes_one_document_the_other(current, wanted):
    assert merged(current, merge_patch(current, wanted)) == wanted


# -- waiting


def test_it_is_ready_when_it_answers(endpoint):
    address, asked = endpoint
    cluster = FakeCluster(service(), pods=[pod("w1")], address=address)
    assert wait(cluster) == []
    assert asked == [PATH]


def test_what_it_waits_for_is_said_once_each_time_that_it_changes(endpoint):
    address, _ = endpoint
    unscheduled = pod("w1", ready=False)
    unscheduled["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": "no GPU free"}]
    cluster = FakeCluster(
        service(state=None, ready="False", observed=0),
        pods=[],
        address=address,
        steps=[
            lambda c: None,
            lambda c: None,
            lambda c: (c.become(state=None, ready="False"), c.its_pods.append(unscheduled)),
            lambda c: c.its_pods.__setitem__(0, pod("w1", ready=False)),
            lambda c: c.its_pods.append(pod("h", node_type="head")),
            lambda c: c.become(state="DEPLOYING", message="loading\nweights", ready="False"),
            lambda c: c.become(ready="False"),
            lambda c: c.its_pods.__setitem__(0, pod("w1")),
            lambda c: c.become(),
        ],
    )
    assert wait(cluster) == [
        f"{NAME}: KubeRay has not seen it yet",
        f"{NAME}: worker pod w1 cannot be scheduled: no GPU free",
        f"{NAME}: waiting for its head pod",
        f"{NAME}: Ray Serve says not started",
        f"{NAME}: Ray Serve says DEPLOYING: loading weights",
        f"{NAME}: 0 of 1 replicas' pods ready",
        f"{NAME}: waiting for the service's endpoints",
    ]


def test_a_second_cluster_is_waited_for_until_the_service_has_moved_over(endpoint):
    address, _ = endpoint
    cluster = FakeCluster(
        service(pending=True),
        pods=[pod("w1")],
        address=address,
        steps=[lambda c: None, lambda c: c.become()],
    )
    assert wait(cluster) == [f"{NAME}: moving over to the new cluster"]


def test_running_without_an_answer_is_not_enough():
    with pytest.raises(TimedOut, match=r"did not answer within 5 s: waiting for an answer\. .*get pods -l"):
        wait(FakeCluster(service(), pods=[pod("w1")]), timeout_s=5.0)


def test_an_answer_that_is_no_success_is_not_enough(endpoint):
    address, asked = endpoint
    with pytest.raises(TimedOut):
        wait(FakeCluster(service(), pods=[pod("w1")], address=address), path="/other", timeout_s=2.0)
    assert set(asked) == {"/other"}


@pytest.mark.parametrize(
    ("change", "pods", "said"),
    [
        ({"state": "DEPLOY_FAILED", "message": "no such model"}, [], "Ray Serve says DEPLOY_FAILED: no such model"),
        ({"reason": "ValidationFailed", "ready": "False"}, [], "ValidationFailed: because ValidationFailed"),
        (
            {},
            [pod("w1", ready=False, waiting={"reason": "InvalidImageName", "message": "bad"})],
            "worker pod w1: ray waits, InvalidImageName: bad",
        ),
    ],
)
def test_what_waiting_does_not_change_ends_it(change, pods, said):
    cluster = FakeCluster(service(**change), pods=pods)
    with pytest.raises(TargetError) as error:
        wait(cluster)
    assert error.value.message == f"{NAME} cannot serve: {said}."


def test_a_failure_of_the_time_before_the_change_does_not_end_it(endpoint):
    address, _ = endpoint
    cluster = FakeCluster(
        service(state="DEPLOY_FAILED"),
        pods=[pod("w1")],
        address=address,
        steps=[*[lambda c: None] * 5, lambda c: c.become()],
    )
    assert wait(cluster) == [f"{NAME}: Ray Serve says DEPLOY_FAILED"]


def test_a_service_that_is_deleted_meanwhile_ends_it():
    with pytest.raises(TargetError, match="was deleted while it was waited for"):
        wait(FakeCluster(service(state="DEPLOYING"), steps=[lambda c: c.delete("rayservices", NAME)]))


def test_kuberays_own_trouble_with_serve_is_told():
    event = {"type": "Warning", "reason": "FailedToUpdateServeApplications", "message": "failed. err: status code 400"}
    pods = [pod("h", node_type="head"), pod("w1", ready=False)]
    found = progress(service(state=None), pods=pods, events=[event], request=request())
    assert found.message == "Ray Serve says not started: status code 400"
    assert not found.failed


# -- replicas


def test_more_replicas_get_their_pods_at_once(endpoint):
    address, _ = endpoint
    cluster = FakeCluster(
        service(),
        pods=[pod("h", node_type="head"), pod("w1")],
        address=address,
        steps=[lambda c: None, lambda c: None, lambda c: c.its_pods.append(pod("w2"))],
    )
    assert wait(cluster, replicas=2) == [
        f"{NAME}: changing the number of pods to 2",
        f"{NAME}: 1 of 2 replicas' pods ready",
    ]
    (group,) = cluster.objects["rayclusters", CLUSTER]["spec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    assert group["template"] == {"spec": {}}


def test_fewer_replicas_give_up_the_pods_that_serve_has_left():
    pods = [pod("h", node_type="head"), pod("w1"), pod("w2", ready=False), pod("w3")]
    change = scaled(ray_cluster(3), pods=pods, replicas=2)
    (group,) = change["spec"]["workerGroupSpecs"]
    assert group["replicas"] == 2
    assert group["scaleStrategy"] == {"workersToDelete": ["w2"]}


def test_a_pod_that_serves_is_not_given_up():
    pods = [pod("w1"), pod("w2"), pod("w3", ready=False)]
    assert scaled(ray_cluster(3), pods=pods, replicas=1) is None


def test_as_many_pods_as_replicas_stay():
    assert scaled(ray_cluster(2), pods=[pod("w1"), pod("w2", ready=False)], replicas=2) is None


def test_fewer_replicas_are_waited_for_until_their_pods_are_given_up(endpoint):
    address, _ = endpoint
    cluster = FakeCluster(
        service(),
        pods=[pod("w1"), pod("w2")],
        replicas=2,
        address=address,
        steps=[
            lambda c: None,
            lambda c: None,
            lambda c: c.its_pods.__setitem__(1, pod("w2", ready=False)),
            lambda c: c.its_pods.pop(),
        ],
    )
    assert wait(cluster, replicas=1) == [
        f"{NAME}: 2 pods, to be 1 once Serve has left the others",
        f"{NAME}: changing the number of pods to 1",
    ]
    (group,) = cluster.objects["rayclusters", CLUSTER]["spec"]["workerGroupSpecs"]
    assert group["scaleStrategy"] == {"workersToDelete": ["w2"]}
