"""What k8s/ installs: complete, of least right, closed to the network, with S3 rights that fit the store."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.store import layout
from orchestrator.target_settings import TargetSettings
from tests.cluster.layout import NAMESPACE, S3_ADDRESS, S3_PORT

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
BASE = K8S / "base"
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
CLUSTER_SCOPED = {"Namespace", "PriorityClass", "WorkloadPriorityClass", "ResourceFlavor", "ClusterQueue"}
ROLES = ("trainer", "releaser", "server", "submitter")

Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomization(folder: Path) -> Document:
    (found,) = documents(folder / "kustomization.yaml")
    return found


def installed(kind: str) -> dict[str, Document]:
    """The base's objects of a kind, by name."""
    listed = [document for name in kustomization(BASE)["resources"] for document in documents(BASE / name)]
    return {document["metadata"]["name"]: document for document in listed if document["kind"] == kind}


# -- kustomize


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_every_file_of_a_folder_is_used_and_every_file_used_is_there(folder: Path) -> None:
    said = kustomization(folder)
    used = [*said["resources"], *(patch["path"] for patch in said.get("patches", ()))]
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {name for name in used if name != "../../base"}
    assert all((folder / name).exists() for name in used)
    assert ("../../base" in used) == (folder != BASE)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_a_patch_changes_an_object_that_the_base_has(folder: Path) -> None:
    for patch in kustomization(folder)["patches"]:
        for document in documents(folder / patch["path"]):
            original = installed(document["kind"])[document["metadata"]["name"]]
            assert document["apiVersion"] == original["apiVersion"]
            assert document["metadata"].get("namespace") == original["metadata"].get("namespace")
            assert set(document["spec"]) <= {*original["spec"], "resourceGroups"}


def test_namespaced_objects_name_the_namespace_and_others_none() -> None:
    for name in kustomization(BASE)["resources"]:
        for document in documents(BASE / name):
            namespace = document["metadata"].get("namespace")
            assert namespace == (None if document["kind"] in CLUSTER_SCOPED else NAMESPACE), document["metadata"]


def test_the_target_settings_defaults_are_what_is_installed() -> None:
    defaults = {name: field.default for name, field in TargetSettings.model_fields.items()}
    assert defaults["namespace"] in installed("Namespace")
    assert {defaults["trainer_account"], defaults["server_account"]} == set(installed("ServiceAccount"))
    assert defaults["queue"] in installed("LocalQueue")
    priorities = {defaults["training_priority"], defaults["serving_priority"]}
    assert priorities == set(installed("PriorityClass")) == set(installed("WorkloadPriorityClass"))
    token = [rule for rule in installed("Role")["headway-submitter"]["rules"] if rule["resources"] == ["secrets"]]
    assert [rule["resourceNames"] for rule in token] == [[defaults["token_secret"]]]


# -- pods and rights


def test_the_namespace_enforces_restricted() -> None:
    labels = installed("Namespace")[NAMESPACE]["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"


def test_pods_get_no_token_of_the_kubernetes_api_and_no_role() -> None:
    accounts = installed("ServiceAccount")
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    subjects = [subject for binding in installed("RoleBinding").values() for subject in binding["subjects"]]
    assert {subject["kind"] for subject in subjects} == {"Group"}
    assert not installed("ClusterRole")
    assert not installed("ClusterRoleBinding")


@pytest.mark.parametrize("name", installed("Role"))
def test_a_role_grants_nothing_wholesale(name: str) -> None:
    for rule in installed("Role")[name]["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"pods/exec", "pods/attach", "serviceaccounts", "serviceaccounts/token"} & set(rule["resources"])
        assert "secrets" not in rule["resources"] or rule["verbs"] == ["get"]


def test_viewers_change_nothing_and_see_no_secret() -> None:
    for rule in installed("Role")["headway-viewer"]["rules"]:
        assert set(rule["verbs"]) <= {"get", "list", "watch"}
        assert not {"secrets", "pods/portforward"} & set(rule["resources"])


# -- network

POLICY_LABELS = {
    "headway.dev/component": {"trainer", "server"},
    "headway.dev/serve-clients": {"true"},
    "ray.io/node-type": {"head"},
    "app.kubernetes.io/component": {"kuberay-operator"},
    "k8s-app": {"kube-dns"},
    "kubernetes.io/metadata.name": {"kube-system", "kuberay-system"},
}


def selected(node: Any) -> list[tuple[str, str]]:
    """(label, value) of every selector within ``node``."""
    if isinstance(node, list):
        return [pair for each in node for pair in selected(each)]
    if not isinstance(node, dict):
        return []
    pairs = list(node.get("matchLabels", {}).items())
    for each in node.get("matchExpressions", ()):
        assert each["operator"] == "In"
        pairs += [(each["key"], value) for value in each["values"]]
    return pairs + [pair for each in node.values() for pair in selected(each)]


def test_all_traffic_is_refused_unless_a_policy_allows_it() -> None:
    assert installed("NetworkPolicy")["default-deny"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }


@pytest.mark.parametrize("name", sorted(set(installed("NetworkPolicy")) - {"default-deny"}))
def test_a_policy_names_who_is_meant_by_labels_that_exist(name: str) -> None:
    spec = installed("NetworkPolicy")[name]["spec"]
    assert set(spec["policyTypes"]) == {kind for kind in ("Ingress", "Egress") if kind.lower() in spec}
    for label, value in selected(spec):
        assert value in POLICY_LABELS[label], f"{label}={value}"
    for peer in [peer for rule in spec.get("ingress", ()) for peer in rule["from"]]:
        assert peer
        assert all(selected(selector) for selector in peer.values())


def test_only_a_runs_own_kind_of_pod_reaches_all_of_its_ports() -> None:
    open_to = {
        (tuple(selected(spec["podSelector"])), tuple(selected(rule["from"])))
        for policy in installed("NetworkPolicy").values()
        for spec in [policy["spec"]]
        for rule in spec.get("ingress", ())
        if "ports" not in rule
    }
    trainer, server = (("headway.dev/component", "trainer"),), (("headway.dev/component", "server"),)
    assert open_to == {(trainer, trainer), (server, server)}


def test_others_reach_the_dashboard_as_the_operator_and_a_server_as_its_clients() -> None:
    ports = {
        (name, port["port"])
        for name, policy in installed("NetworkPolicy").items()
        for rule in policy["spec"].get("ingress", ())
        for port in rule.get("ports", ())
    }
    assert ports == {("kuberay-to-heads", 8265), ("serving", 8000)}


def test_s3_is_reached_at_one_port_and_never_the_nodes_metadata() -> None:
    (rule,) = installed("NetworkPolicy")["s3"]["spec"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 443}]
    assert rule["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]


def test_the_test_overlay_reaches_the_test_clusters_s3_and_nothing_else() -> None:
    (patch,) = documents(K8S / "overlays" / "test" / "s3.yaml")
    assert patch["spec"]["egress"] == [
        {"to": [{"ipBlock": {"cidr": f"{S3_ADDRESS}/32"}}], "ports": [{"protocol": "TCP", "port": S3_PORT}]}
    ]


# -- queue


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_a_queue_has_a_quota_of_every_resource_in_flavours_that_are_installed(folder: Path) -> None:
    own = [document for name in kustomization(folder)["resources"] if name != "../../base"
           for document in documents(folder / name)]  # fmt: skip
    flavours = {*installed("ResourceFlavor"), *(each["metadata"]["name"] for each in own)}
    (queue,) = documents(folder / "queue.yaml")
    (group,) = queue["spec"]["resourceGroups"]
    assert set(group["coveredResources"]) >= {"cpu", "memory", "pods", "nvidia.com/gpu"}
    assert {flavour["name"] for flavour in group["flavors"]} == flavours
    for flavour in group["flavors"]:
        assert [resource["name"] for resource in flavour["resources"]] == group["coveredResources"]


def test_the_queue_takes_runs_of_this_namespace_alone() -> None:
    assert installed("LocalQueue")["headway"]["spec"] == {"clusterQueue": "headway"}
    selector = installed("ClusterQueue")["headway"]["spec"]["namespaceSelector"]
    assert selector == {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}


def test_serving_goes_before_training_and_kueue_alone_takes_runs_away() -> None:
    for kind in ("PriorityClass", "WorkloadPriorityClass"):
        assert installed(kind)["headway-serving"]["value"] > installed(kind)["headway-training"]["value"]
    assert {each["preemptionPolicy"] for each in installed("PriorityClass").values()} == {"Never"}


# -- S3

ARN = "arn:aws:s3:::BUCKET/PREFIX/"
PUT, GET, DELETE = "s3:PutObject", "s3:GetObject", "s3:DeleteObject"
ONCE = {"s3:if-none-match": "*", "s3:ObjectCreationOperation": "true"}
OVER = {"s3:ObjectCreationOperation": "true"}
PART = {"s3:ObjectCreationOperation": "false"}


def policy(role: str) -> list[Document]:
    document = json.loads((K8S / "s3" / f"{role}.json").read_text())
    assert document["Version"] == "2012-10-17"
    statements: list[Document] = document["Statement"]
    return statements


def holds(condition: Document, request: dict[str, str]) -> bool:
    """Whether IAM's condition is met: all operators, and all keys of each."""
    for operator, wanted in condition.items():
        for key, value in wanted.items():
            if operator == "Null":
                met = (key not in request) == (value == "true")
            elif operator == "Bool":
                met = request.get(key) == value
            elif operator == "StringLikeIfExists":
                met = key not in request or any(fnmatchcase(request[key], pattern) for pattern in value)
            else:
                raise AssertionError(f"{operator} is not understood here")
            if not met:
                return False
    return True


def may(role: str, action: str, resource: str, request: dict[str, str] | None = None) -> bool:
    """IAM's answer: one statement allows it and none denies it."""
    effects = {
        statement["Effect"]
        for statement in policy(role)
        if action in statement["Action"]
        and any(fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        and holds(statement.get("Condition", {}), request or {})
    }
    return effects == {"Allow"}


RUN, MODEL = "demo-1a2b3c4d", "demo"
DATASET = layout.dataset_manifest("demo", "fingerprint")
CODE = layout.code("0" * 64)
SHARD = f"{layout.checkpoint(RUN, 100)}00002-nonce/rank-00000.safetensors"
CREATED_BY_TRAINER = (
    DATASET,
    layout.run_spec(RUN),
    layout.outcome(RUN),
    layout.attempt(RUN, 2),
    layout.attempt_end(RUN, 2),
    layout.worker_group(RUN, 2, 1),
    f"{layout.events(RUN)}00002-nonce/00001.jsonl",
    f"{layout.logs(RUN)}00002/head/raylet.out/00001",
    SHARD,
    layout.evaluation(RUN),
    layout.export(RUN),
    layout.version_claim(MODEL, 1),
    layout.version_manifest(MODEL, 1),
)
WEIGHTS = f"{layout.version(MODEL, 1)}model-00001-of-00002.safetensors"
ENTRY, STATUS = layout.channel_entry(MODEL, "production", 7), layout.channel_status(MODEL, "production")


def test_there_is_a_policy_for_each_role_and_none_grants_wholesale() -> None:
    assert {path.stem for path in (K8S / "s3").glob("*.json")} == set(ROLES)
    for role in ROLES:
        for statement in policy(role):
            assert all(re.fullmatch(r"s3:[A-Za-z]+", action) for action in statement["Action"])
            assert all(resource.startswith("arn:aws:s3:::BUCKET") for resource in statement["Resource"])
            assert "arn:aws:s3:::BUCKET/*" not in statement["Resource"]


@pytest.mark.parametrize("key", CREATED_BY_TRAINER)
def test_the_trainer_creates_and_never_replaces(key: str) -> None:
    assert may("trainer", GET, ARN + key)
    assert may("trainer", PUT, ARN + key, ONCE)
    assert not may("trainer", PUT, ARN + key, OVER)


def test_the_trainer_sends_parts_exports_and_deletes_old_checkpoints() -> None:
    assert may("trainer", PUT, ARN + SHARD, PART)
    assert may("trainer", PUT, ARN + WEIGHTS, PART)
    assert may("trainer", PUT, ARN + WEIGHTS, OVER)  # an export is not conditional until its version.json is
    assert may("trainer", PUT, f"{ARN}{layout.run(RUN)}export/00002-nonce/config.json", OVER)
    assert may("trainer", DELETE, ARN + SHARD)
    assert may("trainer", "s3:AbortMultipartUpload", ARN + SHARD)
    assert may("trainer", "s3:ListBucketMultipartUploads", "arn:aws:s3:::BUCKET")


@pytest.mark.parametrize("key", [layout.run_spec(RUN), layout.outcome(RUN), DATASET, CODE, WEIGHTS, ENTRY])
def test_the_trainer_deletes_nothing_else(key: str) -> None:
    assert not may("trainer", DELETE, ARN + key)


@pytest.mark.parametrize("key", [CODE, ENTRY, STATUS])
def test_the_trainer_writes_neither_code_nor_channels(key: str) -> None:
    assert may("trainer", GET, ARN + key)
    assert not any(may("trainer", PUT, ARN + key, request) for request in (ONCE, OVER, PART))


def test_the_releaser_appends_to_channels_and_nothing_else() -> None:
    assert may("releaser", PUT, ARN + ENTRY, ONCE)
    assert not may("releaser", PUT, ARN + ENTRY, OVER)
    for key in (*CREATED_BY_TRAINER, WEIGHTS, STATUS, CODE):
        assert not may("releaser", PUT, ARN + key, ONCE), key
    assert may("releaser", GET, ARN + layout.version_manifest(MODEL, 1))
    assert not may("releaser", GET, ARN + layout.run_spec(RUN))


def test_the_server_writes_its_status_and_sees_of_a_run_its_run_file() -> None:
    assert may("server", PUT, ARN + STATUS, OVER)
    for key in (*CREATED_BY_TRAINER, WEIGHTS, ENTRY, CODE):
        assert not may("server", PUT, ARN + key, ONCE), key
    assert all(may("server", GET, ARN + key) for key in (WEIGHTS, ENTRY, STATUS, CODE, layout.run_spec(RUN)))
    for key in (DATASET, SHARD, layout.outcome(RUN), f"{layout.events(RUN)}00002-nonce/00001.jsonl"):
        assert not may("server", GET, ARN + key), key


def test_who_notifies_claims_the_notice_and_the_server_its_own_alone() -> None:
    rejected, done = layout.notice(RUN, "rejected-00001-production"), layout.notice(RUN, "done")
    for role, key in (("server", rejected), ("trainer", done), ("trainer", rejected)):
        assert may(role, PUT, ARN + key, ONCE)
        assert not may(role, PUT, ARN + key, OVER)
    assert not may("server", PUT, ARN + done, ONCE)


def test_a_submitter_sends_code_and_asks_to_stop() -> None:
    for key in (CODE, layout.stop_request(RUN, 2)):
        assert may("submitter", PUT, ARN + key, ONCE)
        assert not may("submitter", PUT, ARN + key, OVER)
    assert may("submitter", PUT, ARN + CODE, PART)
    for key in (layout.run_spec(RUN), layout.outcome(RUN), layout.attempt(RUN, 2), SHARD, WEIGHTS, ENTRY, STATUS):
        assert may("submitter", GET, ARN + key)
        assert not may("submitter", PUT, ARN + key, ONCE), key


@pytest.mark.parametrize("role", ["trainer", "submitter"])
def test_who_writes_may_probe_the_store(role: str) -> None:
    assert may(role, PUT, f"{ARN}probe/0123", ONCE)
    assert may(role, GET, f"{ARN}probe/0123")
    assert may(role, DELETE, f"{ARN}probe/0123")


@pytest.mark.parametrize(
    ("role", "prefixes"),
    [
        (
            "trainer",
            ["runs/", layout.checkpoints(RUN), layout.versions(MODEL), layout.datasets("demo"), CODE, "probe/0"],
        ),
        ("releaser", ["models/", layout.channel(MODEL, "production")]),
        ("server", [layout.channel(MODEL, "production"), CODE]),
        ("submitter", ["runs/", "models/", layout.attempts(RUN), "probe/0"]),
    ],
)
def test_what_is_listed_is_a_prefix_of_the_store_or_asked_of_a_missing_object(role: str, prefixes: list[str]) -> None:
    bucket = "arn:aws:s3:::BUCKET"
    assert all(may(role, "s3:ListBucket", bucket, {"s3:prefix": f"PREFIX/{prefix}"}) for prefix in prefixes)
    assert may(role, "s3:ListBucket", bucket)
    assert not may(role, "s3:ListBucket", bucket, {"s3:prefix": "another/"})


def test_the_server_lists_no_runs() -> None:
    assert not may("server", "s3:ListBucket", "arn:aws:s3:::BUCKET", {"s3:prefix": "PREFIX/runs/"})


# -- image


def test_the_image_copies_only_what_its_ignore_file_lets_through() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (K8S / "image" / "Containerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    ignore = (K8S / "image" / "Containerfile.dockerignore").read_text().splitlines()
    assert sources == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_as_a_numbered_user_and_installs_what_pods_need() -> None:
    text = (K8S / "image" / "Containerfile").read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"
    assert "--constraint local.txt --requirement pyproject.toml --extra train --extra serve" in text
    version = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "local.txt").read_text(), re.MULTILINE)
    assert version
    assert f"rayproject/ray:{version[1]}-" in text
    assert version[1] == TargetSettings.model_fields["ray_version"].default
