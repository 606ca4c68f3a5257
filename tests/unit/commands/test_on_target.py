"""Commands about a run that is on a target: which job they mean, also before the run is in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from orchestrator import cli
from orchestrator.commands import dashboard, logs, pod, show, submit
from orchestrator.commands.context import find_kubernetes, find_ray
from orchestrator.errors import TargetError, UsageError
from orchestrator.reporter import Reporter
from orchestrator.store import layout
from orchestrator.store.attempts import POD_ENDS, stop_reason
from orchestrator.targets.kubernetes.client import KubernetesClient
from orchestrator.targets.kubernetes.target import KubernetesTarget
from tests.unit.commands.test_submit import (
    FAILED,
    GOING,
    JOB,
    QUEUED,
    RUN,
    FakeTarget,
    claimed,
    document,
    sent,
)
from tests.unit.fakes import MemoryStore
from tests.unit.render.requests import MINIMAL, settings
from tests.unit.targets.test_kubernetes_target import FakeClient


@pytest.fixture
def target(memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    """What ``--target`` and ``--store`` name, whatever they say."""
    found = FakeTarget()
    for module in (logs, show, submit):
        monkeypatch.setattr(module, "find_store", lambda _uri: memory_store)
        monkeypatch.setattr(module, "find_target", lambda _name, _uri: found)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.txt").write_text("text")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document(data={"train": str(tmp_path / "data" / "*.txt")})))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_logs(name: str) -> dict[str, Any]:
    facts, _ = logs.logs(name, target="kubernetes", store_uri=None, follow=False, reporter=Reporter())
    return facts


def status(name: str, target: str = "kubernetes") -> dict[str, Any]:
    facts, _ = show.status(name, target=target, store_uri=None)
    return facts


def under_way(store: MemoryStore, job: str = JOB, state: str | None = None) -> None:
    """The run is in the store, with an attempt of this job."""
    store.create_json(layout.run_spec(RUN), {})
    claimed(store, RUN, job, state)


# -- logs


def test_the_log_of_a_run_that_waits_is_its_jobs(memory_store: MemoryStore, target: FakeTarget, folder: Path) -> None:
    found = sent(folder, memory_store, target)
    target.log = "queued"
    for name in (found.run_id, found.run_id.rpartition("-")[0]):
        assert read_logs(name) == {"run_id": found.run_id, "attempt": 0, "job": found.submission_id, "log": "queued"}


def test_without_a_job_there_is_no_log(memory_store: MemoryStore, target: FakeTarget) -> None:
    memory_store.create_json(layout.run_spec(RUN), {})
    with pytest.raises(UsageError, match=f"{RUN} has no attempt yet") as caught:
        read_logs(RUN)
    assert caught.value.next_step == f"See: headway status --target kubernetes {RUN}"


# -- status


def test_the_job_that_works_on_a_run_now_is_told_of_and_not_the_one_before(
    memory_store: MemoryStore, target: FakeTarget
) -> None:
    under_way(memory_store, state="failed")
    target.jobs = {JOB: FAILED, f"{RUN}-00002": QUEUED}
    facts = status(RUN)
    assert (facts["attempts"], facts["state"]) == (1, "failed")
    assert facts["job"] == f"{RUN}-00002"
    assert "queued" in facts["job_state"]


def test_where_none_works_on_it_the_newest_attempts_job_is(memory_store: MemoryStore, target: FakeTarget) -> None:
    under_way(memory_store, state="failed")
    target.jobs = {JOB: FAILED}
    facts = status(RUN)
    assert facts["job"] == JOB
    assert "it broke" in facts["job_state"]


def test_a_run_in_the_store_whose_job_has_claimed_no_attempt(memory_store: MemoryStore, target: FakeTarget) -> None:
    memory_store.create_json(layout.run_spec(RUN), {})
    assert status(RUN)["job"] is None
    target.jobs = {JOB: GOING}
    facts = status(RUN)
    assert (facts["job"], "RUNNING" in facts["job_state"]) == (JOB, True)


def test_a_target_that_cannot_be_asked_leaves_what_the_store_says(
    memory_store: MemoryStore, target: FakeTarget
) -> None:
    under_way(memory_store)
    target.fails = TargetError("no route to host")
    facts = status(RUN)
    assert (facts["job"], facts["job_state"]) == (JOB, "unknown: no route to host")


def test_without_a_target_none_is_asked(memory_store: MemoryStore, target: FakeTarget) -> None:
    under_way(memory_store)
    target.fails = TargetError("it was asked")
    assert "job_state" not in status(RUN, target="")


# -- submit


def test_whoever_does_not_watch_is_told_how(target: FakeTarget, folder: Path) -> None:
    facts, text = submit.submit(
        folder / "run.yaml",
        target="local",
        store_uri=None,
        detach=True,
        retry=False,
        timeout_s=None,
        reporter=Reporter(),
    )
    assert text.endswith(f"Watch it: headway logs -f --target kubernetes {facts['run_id']}")
    assert target.jobs == {facts["submission_id"]: QUEUED}


# -- dashboard


class ClientWithSecrets(FakeClient):
    def secret(self, _name: str) -> dict[str, str] | None:
        return {"auth_token": "sesame"}


def test_the_dashboard_of_a_run_that_waits_has_no_head_yet(
    memory_store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ClientWithSecrets()
    cluster = KubernetesTarget(settings(), lambda: memory_store, client=cast(KubernetesClient, client))
    found = sent(folder, memory_store, cast(Any, cluster))
    (job,) = client.objects.values()
    job["metadata"]["creationTimestamp"] = "2026-03-01T10:00:00Z"
    monkeypatch.setattr(dashboard, "find_store", lambda _uri: memory_store)
    monkeypatch.setattr(dashboard, "find_kubernetes", lambda _name, _uri: cluster)
    with pytest.raises(TargetError, match=f"{found.run_id} has no head pod: it waits"):
        dashboard.dashboard(
            found.run_id.rpartition("-")[0],
            target="kubernetes",
            store_uri=None,
            port=0,
            open_browser=False,
            reporter=Reporter(),
        )


# -- the option that names a target


def test_an_address_is_its_own_flag() -> None:
    assert find_ray("http://10.0.0.1:8265").flag == " --target http://10.0.0.1:8265"


def test_the_settings_file_is_named_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(MINIMAL))
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    kubernetes = pytest.importorskip("kubernetes")
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    name = f"kubernetes:{tmp_path / 'other.yaml'}"
    assert find_kubernetes(name, None).flag == f" --target {name}"


# -- in a pod


@pytest.mark.parametrize(("host", "reason"), [("head-1", POD_ENDS), ("head-2", None)])
def test_a_head_pod_that_ends_stops_the_attempt_that_is_in_it(
    memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch, host: str, reason: str | None
) -> None:
    attempt = claimed(memory_store, RUN, JOB, host=host)
    monkeypatch.setattr(pod, "open_store", lambda _uri, *, patience: memory_store)
    monkeypatch.setenv("POD_NAME", "head-1")
    assert cli.run(["pod", "save-and-stop", "--run", RUN, "--job", JOB, "--timeout", "0"]) == 0
    assert stop_reason(memory_store, attempt) == reason
