"""What goes to the Kubernetes API, and that any answer becomes a value, or an error of ours with a next step."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes
import pytest
import urllib3
from kubernetes.client.rest import RESTResponse

from orchestrator.errors import EnvironmentUnusable, TargetError
from orchestrator.targets.kubernetes.client import RAY_JOBS, KubernetesClient

HOST = "https://10.0.0.1:6443"
JOB = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "demo-00001"}, "spec": {}}
RAY_JOBS_PATH = "/apis/ray.io/v1/namespaces/team/rayjobs"
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: c, user: u}}
- {name: two, context: {cluster: d, user: u}}
clusters:
- {name: c, cluster: {server: "https://one:6443"}}
- {name: d, cluster: {server: "https://two:6443"}}
users:
- {name: u, user: {token: x}}
"""
Answer = tuple[int, Any] | Exception


class FakeApi:
    """Stands where the ``kubernetes`` package sends its requests. Answers in order, the last one for good."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.sent: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.timeouts: list[Any] = []

    def request(self, method: str, url: str, **content: Any) -> RESTResponse:
        self.sent.append((method, url.removeprefix(HOST), content["body"]))
        self.headers.append(content["headers"])
        self.timeouts.append(content["_request_timeout"])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        headers = {"content-type": "application/json"}
        return RESTResponse(
            urllib3.HTTPResponse(
                io.BytesIO(data), status=status, headers=headers, reason="Its Reason", preload_content=False
            )
        )

    def client(self) -> KubernetesClient:
        configuration = kubernetes.client.Configuration()
        configuration.host = HOST
        api = kubernetes.client.ApiClient(configuration)
        api.rest_client = self
        return KubernetesClient("team", api=api)


def status(code: int, message: str, reason: str = "") -> tuple[int, dict[str, Any]]:
    """An error as the API server words it."""
    return code, {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}


NOT_FOUND = status(404, 'rayjobs.ray.io "demo-00001" not found', "NotFound")
EXISTS = status(409, 'rayjobs.ray.io "demo-00001" already exists', "AlreadyExists")
FORBIDDEN = status(
    403,
    'rayjobs.ray.io is forbidden: User "ann" cannot create resource "rayjobs" in API group "ray.io" in the namespace '
    '"team"',
    "Forbidden",
)


# -- requests


def test_creating_posts_the_very_object() -> None:
    api = FakeApi((201, JOB))
    assert api.client().create(RAY_JOBS, JOB)
    assert api.sent == [("POST", RAY_JOBS_PATH, JOB)]


def test_an_object_that_exists_is_told_apart() -> None:
    assert not FakeApi(EXISTS).client().create(RAY_JOBS, JOB)


def test_reading() -> None:
    api = FakeApi((200, JOB))
    assert api.client().get(RAY_JOBS, "demo-00001") == JOB
    assert api.sent == [("GET", f"{RAY_JOBS_PATH}/demo-00001", None)]


def test_changing_merges() -> None:
    api = FakeApi((200, JOB))
    assert api.client().patch(RAY_JOBS, "demo-00001", {"spec": {"suspend": True}}) == JOB
    assert api.sent == [("PATCH", f"{RAY_JOBS_PATH}/demo-00001", {"spec": {"suspend": True}})]
    assert api.headers[0]["Content-Type"] == "application/merge-patch+json"


def test_deleting_takes_what_belongs_to_it_afterwards() -> None:
    # With the cluster gone first, KubeRay would make another one for a service that is still there.
    api = FakeApi((200, {"kind": "Status"}))
    assert api.client().delete(RAY_JOBS, "demo-00001")
    (method, url, _) = api.sent[0]
    parts = urlsplit(url)
    assert (method, parts.path) == ("DELETE", f"{RAY_JOBS_PATH}/demo-00001")
    assert parse_qs(parts.query) == {"propagationPolicy": ["Background"]}


def test_what_is_not_there() -> None:
    client = FakeApi(NOT_FOUND).client()
    assert client.get(RAY_JOBS, "demo-00001") is None
    assert client.patch(RAY_JOBS, "demo-00001", {}) is None
    assert not client.delete(RAY_JOBS, "demo-00001")
    assert client.secret("headway-ray-token") is None


def test_pods_come_in_the_apis_own_words() -> None:
    pod = {"metadata": {"name": "p", "deletionTimestamp": "2026-03-01T10:00:00Z"}, "status": {"podIP": "10.1.2.3"}}
    api = FakeApi((200, {"kind": "PodList", "items": [pod]}))
    (found,) = api.client().pods("ray.io/cluster=demo")
    assert (found["metadata"]["name"], found["status"]) == ("p", {"podIP": "10.1.2.3"})
    assert found["metadata"]["deletionTimestamp"].startswith("2026-03-01T10:00:00")
    parts = urlsplit(api.sent[0][1])
    assert parts.path == "/api/v1/namespaces/team/pods"
    assert parse_qs(parts.query) == {"labelSelector": ["ray.io/cluster=demo"]}


def test_events_come_oldest_first() -> None:
    events = [
        {"metadata": {}, "involvedObject": {}, "reason": reason, **times}
        for reason, times in (
            ("last", {"lastTimestamp": "2026-03-01T10:00:09Z"}),
            ("middle", {"eventTime": "2026-03-01T10:00:05.123456Z"}),
            ("first", {"lastTimestamp": "2026-03-01T10:00:01Z"}),
        )
    ]
    api = FakeApi((200, {"kind": "EventList", "items": events}))
    assert [event["reason"] for event in api.client().events("demo-00001")] == ["first", "middle", "last"]
    assert parse_qs(urlsplit(api.sent[0][1]).query) == {"fieldSelector": ["involvedObject.name=demo-00001"]}


def test_workloads_of_an_older_kueue_or_of_none() -> None:
    item = {"metadata": {"name": "w"}}
    newest = FakeApi((200, {"items": [item]}))
    assert newest.client().workloads() == [item]
    older = FakeApi((404, "404 page not found\n"), (200, {"items": [item]}))
    assert older.client().workloads() == [item]
    assert [urlsplit(url).path.split("/")[3] for _, url, _ in older.sent] == ["v1beta2", "v1beta1"]
    assert FakeApi((404, "404 page not found\n")).client().workloads() == []


def test_a_secrets_values() -> None:
    api = FakeApi((200, {"data": {"auth_token": "aHVudGVyMg=="}}))
    assert api.client().secret("headway-ray-token") == {"auth_token": "hunter2"}
    assert FakeApi((200, {})).client().secret("empty") == {}


def test_every_request_has_a_time_limit() -> None:
    api = FakeApi((200, {"items": []}))
    client = api.client()
    client.pods("a=b")
    client.workloads()
    client.get(RAY_JOBS, "x")
    assert len(api.timeouts) == 3
    assert None not in api.timeouts


# -- refusals


@pytest.mark.parametrize(
    ("answer", "words", "next_step"),
    [
        pytest.param(
            FORBIDDEN,
            r'does not let you create RayJob demo-00001 in namespace team: rayjobs\.ray\.io is forbidden: User "ann"',
            "headway-submitter",
            id="403",
        ),
        pytest.param(
            status(401, "Unauthorized"),
            r"at https://10\.0\.0\.1:6443 cannot be used \(Unauthorized\)",
            "kubectl",
            id="401",
        ),
        pytest.param(
            status(404, 'namespaces "team" not found'),
            r'cannot create RayJob demo-00001: namespaces "team" not found',
            "namespace team exist",
            id="404, no namespace",
        ),
        pytest.param(
            (404, "404 page not found\n"), r"cannot create RayJob demo-00001: Its Reason", "KubeRay", id="404, no CRD"
        ),
    ],
)
def test_a_refusal_says_who_and_what_to_do(answer: Answer, words: str, next_step: str) -> None:
    with pytest.raises(TargetError, match=words) as caught:
        FakeApi(answer).client().create(RAY_JOBS, JOB)
    assert next_step in caught.value.next_step


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            status(422, 'RayJob.ray.io "Demo" is invalid: spec.rayClusterSpec: Required value.'),
            r'refused to create RayJob demo-00001: RayJob\.ray\.io "Demo" is invalid: .*: Required value\.$',
        ),
        (
            status(500, 'Internal error occurred: failed calling webhook "mrayjob.kb.io"'),
            r'refused to create RayJob demo-00001: Internal error occurred: .* webhook "mrayjob\.kb\.io"\.$',
        ),
        ((503, ""), r"refused to create RayJob demo-00001: Its Reason\.$"),
        ((503, "upstream [not json"), r"refused to create RayJob demo-00001: Its Reason\.$"),
        ((503, '["a list"]'), r"refused to create RayJob demo-00001: Its Reason\.$"),
    ],
)
def test_any_other_refusal_has_the_apis_own_words(answer: Answer, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        FakeApi(answer).client().create(RAY_JOBS, JOB)


POOL = urllib3.HTTPSConnectionPool("10.0.0.1", 6443)


@pytest.mark.parametrize(
    "raised",
    [
        urllib3.exceptions.MaxRetryError(POOL, "/api", OSError("Connection refused")),
        urllib3.exceptions.ConnectTimeoutError("timed out"),
        urllib3.exceptions.ReadTimeoutError(POOL, "/api", "timed out"),
        urllib3.exceptions.ProtocolError("Connection aborted."),
        urllib3.exceptions.SSLError("certificate verify failed"),
        ConnectionResetError("reset"),
        FileNotFoundError("client.crt"),
    ],
)
def test_a_cluster_that_cannot_be_reached(raised: Exception) -> None:
    client = FakeApi(raised).client()
    calls = [lambda: client.get(RAY_JOBS, "x"), lambda: client.pods("a"), lambda: client.secret("x"), client.workloads]
    for call in calls:
        with pytest.raises(TargetError, match=r"Kubernetes at https://10\.0\.0\.1:6443 cannot be used") as caught:
            call()
        assert "kubectl get namespaces" in caught.value.next_step
        assert caught.value.__cause__ is raised


def test_a_conflict_is_an_error_where_nothing_is_created() -> None:
    with pytest.raises(TargetError, match=r"refused to change rayjobs/demo-00001"):
        FakeApi(status(409, "the object has been modified")).client().patch(RAY_JOBS, "demo-00001", {})


# -- finding a cluster


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What KUBECONFIG names; the package reads it when it is imported."""
    path = tmp_path / "config"
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return path


def test_the_current_context_or_the_one_named(kubeconfig: Path) -> None:
    kubeconfig.write_text(KUBECONFIG)
    assert KubernetesClient("team").host == "https://one:6443"
    assert KubernetesClient("team", context="two").host == "https://two:6443"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No configuration found"),
        ("", "is empty"),
        ("a: [", "while parsing"),
        ("- a\n", "list indices"),
        ("apiVersion: v1\nkind: Config\ncontexts: []\nclusters: []\nusers: []\n", "current-context"),
    ],
)
def test_without_a_usable_kubeconfig(kubeconfig: Path, text: str | None, words: str) -> None:
    if text is not None:
        kubeconfig.write_text(text)
    with pytest.raises(EnvironmentUnusable, match=f"There is no usable kubeconfig: .*{words}") as caught:
        KubernetesClient("team")
    assert "KUBECONFIG" in caught.value.next_step
    assert "\n" not in caught.value.message


def test_a_folder_is_no_kubeconfig(kubeconfig: Path) -> None:
    kubeconfig.mkdir()
    with pytest.raises(EnvironmentUnusable, match="Is a directory"):
        KubernetesClient("team")


def test_a_context_that_is_not_there(kubeconfig: Path) -> None:
    kubeconfig.write_text(KUBECONFIG)
    with pytest.raises(EnvironmentUnusable, match="three"):
        KubernetesClient("team", context="three")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(EnvironmentUnusable, match="needs the kubernetes package") as caught:
        KubernetesClient("team")
    assert "pip install 'headway[kubernetes]'" in caught.value.next_step
