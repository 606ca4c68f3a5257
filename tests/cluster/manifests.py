"""What is applied to the cluster: CoreDNS, and KubeRay's and Kueue's own manifests with this cluster's images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import credentials, versions
from tests.cluster.build import module_directory
from tests.cluster.images import image_name
from tests.cluster.layout import CLUSTER_DOMAIN, DNS_SERVICE_ADDRESS, Layout
from tests.cluster.shell import run
from tests.cluster.versions import Program

Manifest = dict[str, Any]

KUBERAY_NAMESPACE = "kuberay-system"
KUEUE_NAMESPACE = "kueue-system"
KUEUE_INTEGRATIONS = ("ray.io/rayjob", "ray.io/raycluster")
_KUEUE_WEBHOOKS = {
    f"{kind}.kb.io" for kind in ("clusterqueue", "cohort", "resourceflavor", "workload", "rayjob", "raycluster")
}
"""Those of Kueue's own kinds and of its integrations above, after one letter for what they do.

The others would stand in the way of every pod.
"""
_METRICS_CERTIFICATE = "/etc/kueue/metrics/certs"
_WEBHOOK_SECRET = "kueue-webhook-server-cert"


def render_upstream(layout: Layout) -> list[str]:
    """Render KubeRay's and Kueue's kustomizations once per version, and say which that was."""
    rendered = []
    for program in (versions.KUBERAY_OPERATOR, versions.KUEUE_MANAGER):
        target = _rendered(layout, program)
        if not target.exists():
            source = module_directory(program) / "config" / "default"
            objects = list(yaml.load_all(run([layout.program("kubectl"), "kustomize", str(source)]), yaml.CSafeLoader))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            partial.write_text(json.dumps(objects))
            partial.replace(target)
            rendered.append(program.name)
    return rendered


def all_addons(layout: Layout) -> dict[str, list[Manifest]]:
    """What is applied, by name; in any order."""
    return {"DNS": coredns(), "KubeRay": kuberay(layout), "Kueue": kueue(layout)}


def kuberay(layout: Layout) -> list[Manifest]:
    """KubeRay's objects, the operator as a pod in a namespace of its own."""
    objects = json.loads(_rendered(layout, versions.KUBERAY_OPERATOR).read_text())
    for each in objects:
        if each["metadata"].get("namespace") == "default":
            each["metadata"]["namespace"] = KUBERAY_NAMESPACE
        for subject in each.get("subjects", ()):
            if subject.get("namespace") == "default":
                subject["namespace"] = KUBERAY_NAMESPACE
        if each["kind"] == "Deployment":
            _suit(each, versions.KUBERAY_OPERATOR, cpu="50m")
    return [_namespace(KUBERAY_NAMESPACE), *objects]


def kueue(layout: Layout) -> list[Manifest]:
    """Kueue's objects, with its webhooks' certificate signed by the cluster's own authority.

    Left to make its own, Kueue waits until the kubelet has brought the new Secret to its pod, up to two minutes.
    """
    objects = []
    for each in json.loads(_rendered(layout, versions.KUEUE_MANAGER).read_text()):
        kind, name = each["kind"], each["metadata"]["name"]
        if kind == "APIService" or (kind, name) == ("Secret", _WEBHOOK_SECRET):
            continue
        if kind == "Deployment":
            _suit(each, versions.KUEUE_MANAGER, cpu="100m")
            manager = each["spec"]["template"]["spec"]["containers"][0]
            # Its visibility API is served through an APIService, for which the API server needs one more authority.
            manager["args"].append("--feature-gates=VisibilityOnDemand=false")
            # Its metrics' certificate too is then ours to bring: https://kueue.sigs.k8s.io, "configure external cert".
            manager["volumeMounts"].append({"name": "cert", "mountPath": _METRICS_CERTIFICATE, "readOnly": True})
        elif kind == "ConfigMap" and "controller_manager_config.yaml" in each["data"]:
            each["data"]["controller_manager_config.yaml"] = _kueue_config(each)
        elif kind.endswith("WebhookConfiguration"):
            each["webhooks"] = [hook for hook in each["webhooks"] if hook["name"][1:] in _KUEUE_WEBHOOKS]
            for hook in each["webhooks"]:
                hook["clientConfig"]["caBundle"] = credentials.authority_base64(layout)
        elif kind == "CustomResourceDefinition" and "webhook" in each["spec"].get("conversion", {}):
            client = each["spec"]["conversion"]["webhook"]["clientConfig"]
            client["caBundle"] = credentials.authority_base64(layout)
        objects.append(each)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": _WEBHOOK_SECRET, "namespace": KUEUE_NAMESPACE},
        "type": "kubernetes.io/tls",
        "stringData": {
            "tls.crt": credentials.certificate(layout, "kueue-webhook").read_text(),
            "tls.key": credentials.key(layout, "kueue-webhook").read_text(),
        },
    }
    return [*objects, secret]


def coredns() -> list[Manifest]:
    """DNS for pods, under the name and labels that network policies select it by everywhere."""
    labels = {"k8s-app": "kube-dns"}
    named = {"name": "coredns", "namespace": "kube-system"}
    corefile = f""".:53 {{
    errors
    ready
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa
    cache 5
}}
"""
    container = {
        "name": "coredns",
        "image": image_name(versions.COREDNS_SERVER),
        "imagePullPolicy": "IfNotPresent",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
        ],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "70Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsUser": 0,
        },
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"}
    subject = {"kind": "ServiceAccount", **named}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "system:coredns"}}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        {**rbac, "kind": "ClusterRole", "rules": rules},
        {**rbac, "kind": "ClusterRoleBinding", "roleRef": role, "subjects": [subject]},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": {"Corefile": corefile}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {**named, "labels": labels},
            "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
            "spec": {"clusterIP": DNS_SERVICE_ADDRESS, "selector": labels, "ports": ports},
        },
    ]


def _kueue_config(config_map: Manifest) -> str:
    config = yaml.safe_load(config_map["data"]["controller_manager_config.yaml"])
    config["integrations"] = {"frameworks": list(KUEUE_INTEGRATIONS)}
    config["internalCertManagement"] = {"enable": False}
    config["leaderElection"] = {"leaderElect": False}
    return yaml.safe_dump(config)


def _suit(deployment: Manifest, program: Program, *, cpu: str) -> None:
    """This cluster's image; little CPU reserved, none refused; looked at from its first second on."""
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["image"] = image_name(program)
    container["imagePullPolicy"] = "IfNotPresent"
    container["resources"] = {"requests": {"cpu": cpu, "memory": "128Mi"}, "limits": {"memory": "512Mi"}}
    container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}


def _namespace(name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _rendered(layout: Layout, program: Program) -> Path:
    return layout.sources / "manifests" / f"{program.name}-{program.version}.json"
