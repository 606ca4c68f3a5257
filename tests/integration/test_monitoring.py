"""Rules and dashboards of k8s/monitoring against a real Prometheus that scrapes a real run and a served model."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.store import open_store
from orchestrator.targets import local, ports
from tests.command_line import headway
from tests.integration.test_gate_road import put_corpus
from tests.monitoring import files
from tests.monitoring.server import Prometheus, program, prometheus
from tests.tiny_run import TINY_LLAMA

RUN_TIMEOUT_S, SERVE_TIMEOUT_S, SEEN_TIMEOUT_S = 240.0, 120.0, 60.0
MODEL = "watched-lm"
VARIABLES = {"namespace": ".*", "run": ".*", "version": ".*", "session": ".*"}
VARIABLES |= {"__rate_interval": "1m", "__range": "5m"}

NO_GPU = "the machine of the tests has no GPU"
NO_FAULT = "nothing goes wrong in this run"
CANNOT_SHOW = {
    "ray_node_gpus_utilization": NO_GPU,
    "ray_node_gram_used": NO_GPU,
    "ray_headway_train_mfu": NO_GPU,
    "ray_headway_train_restarts_total": NO_FAULT,
    "ray_headway_checkpoint_failures_total": NO_FAULT,
    "headway_rejected": NO_FAULT,
}
"""Metrics that this run does not emit, and why."""
CANNOT_BE = {"HeadwayThroughputFell": "the run is not half an hour old", "HeadwayQueueFull": "no queue is full"}
"""Alerts whose left-hand side stays empty though all of its metrics are there, and why."""


# -- the rules


def test_rules_are_rules(tmp_path: Path) -> None:
    said = subprocess.run(
        [program("promtool"), "check", "rules", "--lint-fatal", files.write_rule_file(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stdout + said.stderr


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    """tests/monitoring/alerts.yaml, in promtool's own format."""
    files.write_rule_file(tmp_path)
    tests = tmp_path / "alerts.yaml"
    tests.write_text(files.ALERT_TESTS.read_text())
    said = subprocess.run([program("promtool"), "test", "rules", tests], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


# -- a run


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A Prometheus that has seen a run and a served model."""

    prometheus: Prometheus
    begin_s: float

    def shows(self, expression: str) -> bool:
        """Whether a panel would show anything, of all the time that was watched."""
        filled = re.sub(r"\$(\w+)", lambda name: VARIABLES[name[1]], expression)
        return bool(self.prometheus.between(filled, begin_s=self.begin_s, end_s=time.time(), step_s=2.0))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A stack of its own, whose Ray exports every second and not every ten."""
    directory = tmp_path_factory.mktemp("watched")
    free: list[int] = []
    for _ in range(3):
        free.append(ports.choose([], taken=free, seed=len(free) + directory.stat().st_ino))
    options = local.StackOptions(dashboard_port=free[0], serve_port=free[1], num_cpus=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        stack = local.up(directory / ".headway", options, lambda _: None)
        try:
            for name, value in stack.store_environment().items():
                patch.setenv(name, value)
            discovery = stack.temp_directory / "prom_metrics_service_discovery.json"
            config = write_config(directory, discovery=discovery, serve_port=stack.ray_ports.serve)
            begin_s = time.time()
            with prometheus(config, directory=directory, port=free[2]) as server:
                train(directory)
                endpoint = serve(directory)
                found = Watched(prometheus=server, begin_s=begin_s)
                ask_until_seen(found, endpoint)
                yield found
        finally:
            local.down(directory / ".headway", lambda _: None)


def write_config(directory: Path, *, discovery: Path, serve_port: int) -> Path:
    """The configuration of docs/record.md, with this stack's places and a shorter interval."""
    document = yaml.safe_load(files.block("yaml prometheus"))
    document["global"] = dict.fromkeys(document["global"], "1s")
    assert [each["job_name"] for each in document["scrape_configs"]] == ["ray", "headway-replicas"]
    ray, replicas = document["scrape_configs"]
    (ray_files,) = ray["file_sd_configs"]
    ray_files |= {"files": [str(discovery)], "refresh_interval": "1s"}
    (replica_targets,) = replicas["static_configs"]
    assert replica_targets["targets"] == ["127.0.0.1:8000"]
    replica_targets["targets"] = [f"127.0.0.1:{serve_port}"]
    files.write_rule_file(directory)
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def train(directory: Path) -> None:
    store = open_store()
    put_corpus(store.at(store.bucket, "watched-corpus"))
    document: dict[str, Any] = {
        "apiVersion": "headway/v1",
        "name": "watched",
        "model": {"architecture": TINY_LLAMA},
        "data": {
            "train": f"s3://{store.bucket}/watched-corpus/**/*.txt", "vocab_size": 300, "eval_fraction": 0.1,
            "sequence_length": 32,
        },
        "train": {
            "steps": 120, "global_batch_size": 8, "micro_batch_size": 8, "optimizer": {"learning_rate": 3e-3},
            "evaluate": {"every_steps": 40, "max_samples": 16},
        },
        "checkpoint": {"every_steps": 20},
        "gate": {"max_loss": 9.0, "max_eval_samples": 16},
        "release": {"model": MODEL},
    }  # fmt: skip
    (directory / "run.yaml").write_text(yaml.safe_dump(document))
    headway("submit", "run.yaml", directory=directory, timeout_s=RUN_TIMEOUT_S).assert_done()


def serve(directory: Path) -> str:
    said = headway("serve", MODEL, "--json", directory=directory, timeout_s=SERVE_TIMEOUT_S)
    endpoint: str = said.assert_done().json["endpoint"]
    return endpoint


def ask_until_seen(watched: Watched, endpoint: str) -> None:
    """Requests that go well, and one that does not, until Prometheus has seen what is counted of them grow."""
    seen = ("rate(headway_requests_total[1m]) > 0", "rate(ray_serve_num_http_requests_total[1m]) > 0")
    deadline_s = time.monotonic() + SEEN_TIMEOUT_S
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 4}
    with httpx.Client(base_url=endpoint, timeout=30.0) as http:
        while not all(watched.prometheus.now(expression) for expression in seen):
            assert time.monotonic() < deadline_s, "Prometheus sees no requests"
            assert http.post("/v1/completions", json=body).status_code == 200
            assert http.post("/v1/completions", json={**body, "model": "another"}).status_code == 404


def reason(expression: str) -> str | None:
    """Why a query cannot show anything: it is of a metric that this run does not emit, and of no other."""
    why = {CANNOT_SHOW.get(name) for name in files.metrics(expression)}
    return why.pop() if len(why) == 1 else None


@pytest.mark.full
def test_every_panel_shows_something(watched: Watched) -> None:
    empty = [place for place, query in files.queries() if not watched.shows(query) and not reason(query)]
    assert empty == []


@pytest.mark.full
def test_what_cannot_show_does_not(watched: Watched) -> None:
    """Else it is left out of the tests for nothing."""
    assert {name for name in CANNOT_SHOW if watched.shows(name)} == set()


@pytest.mark.full
def test_every_rule_records_something(watched: Watched) -> None:
    recorded = [(rule["record"], rule["expr"]) for rule in files.rules() if "record" in rule]
    assert [name for name, expression in recorded if not watched.shows(name) and not reason(expression)] == []


@pytest.mark.full
def test_an_alerts_left_hand_side_is_there_and_it_does_not_fire(watched: Watched) -> None:
    alerts = {rule["alert"]: rule["expr"] for rule in files.rules() if "alert" in rule}
    empty = {name for name, expression in alerts.items() if not watched.shows(without_limit(expression))}
    unexplained = {name for name in empty - CANNOT_BE.keys() if not reason(unfolded(alerts[name]))}
    assert unexplained == set()
    assert [each["metric"] for each in watched.prometheus.now('ALERTS{alertstate="firing"}')] == []


def without_limit(expression: str) -> str:
    """The same with comparisons that drop nothing."""
    return re.sub(r"(?<= )([<>]=?|==)(?= (?!on))", r"\1 bool", expression)


def unfolded(expression: str) -> str:
    """With what its rules record put in."""
    recorded = {rule["record"]: rule["expr"] for rule in files.rules() if "record" in rule}
    while any(name in expression for name in recorded):
        for name, meaning in recorded.items():
            expression = expression.replace(name, meaning)
    return expression
