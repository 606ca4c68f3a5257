"""k8s/monitoring without a Prometheus: it finds the pods that Headway renders, and its dashboards are whole."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.render import ray_job
from orchestrator.render.ray_service import ray_service
from tests.monitoring.files import ALERT_TESTS, DASHBOARDS, FOLDER, ROOT, dashboard, panels, queries, rules
from tests.unit.render.requests import attempt, settings

KUBERAY_PORTS = {"metrics": 8080}
"""What KubeRay 1.6 adds to a Ray container that has no port of that name."""
UNITS = {"none", "locale", "s", "sci", "percent", "percentunit", "bytes", "mbytes", "Bps", "reqps", "rowsps"}
VARIABLES = {"datasource", "namespace", "run", "session", "version", "__rate_interval", "__range"}
each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)

Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


# -- kustomize


def test_every_file_is_installed() -> None:
    (said,) = documents("kustomization.yaml")
    (generated,) = said["configMapGenerator"]
    assert set(said["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert generated["files"] == [str(path.relative_to(FOLDER)) for path in DASHBOARDS]
    assert said["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    # What kubectl apply keeps of an object in an annotation: https://kubernetes.io/docs/concepts/overview/working-with-objects/annotations/
    assert sum(path.stat().st_size for path in DASHBOARDS) < 200_000


def test_all_lies_in_headways_namespace() -> None:
    (said,) = documents("kustomization.yaml")
    named = [each["metadata"]["namespace"] for name in said["resources"] for each in documents(name)]
    assert {*named, said["configMapGenerator"][0]["namespace"]} == {"headway"}


# -- scraping


def pods() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """Labels and ports of each kind of pod as it runs: what Headway renders, and what KubeRay adds."""
    job = ray_job(attempt(), settings()).body()["spec"]["rayClusterSpec"]
    service = ray_service(
        model="lm", channel="production", store_uri="s3://b/p", replicas=1, version="0.1.0", settings=settings()
    ).manifest["spec"]["rayClusterConfig"]
    found = {}
    for component, cluster in (("trainer", job), ("server", service)):
        groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
        for node, group in groups.items():
            template = group["template"]
            assert "metrics-export-port" not in group["rayStartParams"]  # KubeRay sets it to the port that it adds
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", ())}
            labels = {**template["metadata"]["labels"], "ray.io/node-type": node}
            found[f"{component} {node}"] = (labels, {**KUBERAY_PORTS, **ports})
    return found


def selects(selector: Document, labels: dict[str, str]) -> bool:
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def scraped() -> set[tuple[str, int]]:
    """(kind of pod, port) by the PodMonitors, where the pod has the port."""
    found = set()
    for monitor in documents("pods.yaml"):
        for name, (labels, ports) in pods().items():
            if selects(monitor["spec"]["selector"], labels):
                found |= {(name, ports[each["port"]]) for each in monitor["spec"]["podMetricsEndpoints"]}
    return found


def test_rays_metrics_of_every_pod_are_scraped_and_a_replicas_own() -> None:
    every = {(name, 8080) for name in ("trainer head", "trainer worker", "server head", "server worker")}
    assert scraped() == {*every, ("server worker", 8000)}


def test_what_is_scraped_is_let_in_and_only_from_namespaces_with_the_label() -> None:
    let_in = set()
    for policy in documents("network.yaml"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        (rule,) = policy["spec"]["ingress"]
        assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"headway.dev/monitoring": "true"}}}]
        for name, (labels, _) in pods().items():
            if selects(policy["spec"]["podSelector"], labels):
                let_in |= {(name, port["port"]) for port in rule["ports"]}
    assert let_in - scraped() == {("server head", 8000)}
    assert scraped() <= let_in


# -- rules


def test_each_alert_says_what_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    headings = re.findall(r"^#### (\w+)$", (ROOT / "docs" / "record.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(alert["alert"] for alert in alerts)
    for alert in alerts:
        assert alert["labels"].keys() == {"severity"}
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] == f"docs/record.md#{alert['alert'].lower()}"


def test_each_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    does_not = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == does_not == {rule["alert"] for rule in rules() if "alert" in rule}


def test_what_is_recorded_is_used() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for _, query in queries() for name in re.findall(r"\w+:\w+:\w+", query)}
    used |= {name for rule in rules() for name in re.findall(r"\w+:\w+:\w+", rule["expr"])}
    assert used == recorded


# -- dashboards


def test_dashboards_are_told_apart_and_belong_together() -> None:
    found = [dashboard(path) for path in DASHBOARDS]
    assert [each["uid"] for each in found] == [f"headway-{path.stem}" for path in DASHBOARDS]
    assert len({each["title"] for each in found}) == len(found)
    for each in found:
        assert each["tags"] == ["headway"]
        assert "id" not in each  # Grafana's own, of the one that exported it
        assert each["schemaVersion"] == 41


@each_dashboard
def test_panels_are_whole(path: Path) -> None:
    document = dashboard(path)
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    for panel in panels(document):
        where = panel["title"]
        assert panel["title"], where
        assert panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, where
        assert panel["targets"], where
        assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])]), where
        assert all(target["legendFormat"] and target["expr"] for target in panel["targets"]), where
        for source in [panel["datasource"], *(target["datasource"] for target in panel["targets"])]:
            assert source == {"type": "prometheus", "uid": "${datasource}"}, where


@each_dashboard
def test_no_panel_covers_another(path: Path) -> None:
    document = dashboard(path)
    places = [panel["gridPos"] for panel in document["panels"]]
    assert all(each["x"] >= 0 and each["x"] + each["w"] <= 24 and each["w"] and each["h"] for each in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@each_dashboard
def test_variables_are_asked_for_and_used(path: Path) -> None:
    document = dashboard(path)
    named = [variable["name"] for variable in document["templating"]["list"]]
    assert named[0] == "datasource"
    texts = [target["expr"] for panel in panels(document) for target in panel["targets"]]
    texts += [variable["query"]["query"] for variable in document["templating"]["list"][1:]]
    used = {name for text in texts for name in re.findall(r"\$(\w+)", text)} | {"datasource"}
    assert used <= VARIABLES
    assert {name for name in used if not name.startswith("__")} == set(named)
    for variable in document["templating"]["list"][1:]:
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert variable["includeAll"]
        assert variable["multi"]
