"""``headway retrain`` as CI calls it, on one embedded stack: many at once, killed, cancelled, and through an outage.

The tests go in order: they are one change's way from the first call to the version.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from orchestrator.errors import NotFound
from orchestrator.record import EventReader
from orchestrator.record.run_record import read_record
from orchestrator.store import layout, open_store
from orchestrator.store.attempts import attempt_end, newest_attempt
from orchestrator.targets import processes
from orchestrator.targets.stack import Stack
from tests.command_line import Said, finish, start
from tests.faults.fault import Fault, Kind
from tests.faults.proxy import FaultProxy
from tests.integration.project import ProjectFolder, settings_of
from tests.integration.test_bad_days import SLOW_TASK, put_corpus
from tests.tiny_run import TINY_LLAMA

WAIT_S = 180.0
AT_ONCE = 20
OUTAGE_S = 20.0
"""In the test. The retries outlast a minute as well: tests/unit/store/test_client.py adds them up."""
STEPS = 200


class Project(ProjectFolder):
    """A repository that CI trains from."""

    def start(self, *options: str, **settings: str) -> subprocess.Popen[str]:
        return self.command("retrain", "run.yaml", "--target", self.target, *options, **settings)

    def retrain(self, *options: str, **settings: str) -> Said:
        return finish(self.start(*options, **settings), timeout_s=WAIT_S)

    @property
    def run_id(self) -> str:
        (run_id,) = [run for run in self.store.list_folders("runs/") if run.rpartition("-")[0] == self.name]
        return run_id

    def wait_for_step(self, attempt: int) -> None:
        def trains() -> bool:
            events = EventReader(self.store, self.run_id, from_attempt=attempt).poll()
            return any(event["kind"] == "step" for event in events)

        wait_for(trains, f"a step of attempt {attempt}")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    assert processes.wait_until(condition, timeout_s=WAIT_S, ended=lambda: False), f"{what} did not come"


@pytest.fixture(scope="module")
def project(
    stack: Stack, stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    directory, name = tmp_path_factory.mktemp("project"), f"retrain-{secrets.token_hex(2)}"
    (directory / "slow_task.py").write_text(SLOW_TASK.format(fast=str(directory / "fast")))
    with settings_of(stack_environment) as settings:
        store = open_store()
        put_corpus(store.at(store.bucket, name))
        run = {
            "apiVersion": "headway/v1",
            "name": name,
            "task": "slow_task:SlowTask",
            "model": {"architecture": TINY_LLAMA},
            "data": {
                "train": f"s3://{store.bucket}/{name}/*.txt",
                "vocab_size": 300,
                "eval_fraction": 0.2,
                "sequence_length": 32,
            },
            "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8},
            "checkpoint": {"every_steps": 8},
            "gate": {"max_eval_samples": 64},
            "release": {"model": name},
        }
        (directory / "run.yaml").write_text(yaml.safe_dump(run))
        yield Project(directory=directory, target=stack.dashboard_url, settings=settings, store=store, name=name)


def test_many_at_once_are_one_run(project: Project) -> None:
    github = {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "me/models"}
    children = [project.start("--json", **github) for _ in range(AT_ONCE)]
    answers = [finish(child, timeout_s=WAIT_S).assert_done().json for child in children]
    assert {answer["run_id"] for answer in answers} == {project.run_id}
    assert len({answer["submission_id"] for answer in answers}) == 1
    assert sorted(answer["outcome"] for answer in answers) == ["attached"] * (AT_ONCE - 1) + ["submitted"]
    (sent,) = read_record(project.store, project.run_id, now_s=time.time()).submissions
    assert sent.facts["ci"] == {"system": "github", "repository": "me/models"}


def test_one_that_is_killed_takes_nothing_with_it(project: Project) -> None:
    project.wait_for_step(1)
    child = project.start("--wait")
    assert child.stderr is not None
    assert "attached" in child.stderr.readline()
    child.kill()
    child.communicate()
    assert attempt_end(project.store, project.run_id, 1) is None


def test_a_cancelled_job_leaves_the_run_alone(project: Project) -> None:
    said = cancel(project.start("--wait", "--json"))
    said.assert_refused(130, "Cancelled", project.run_id, "goes on")
    with pytest.raises(NotFound):
        project.store.get(layout.stop_request(project.run_id, 1))


def test_or_stops_it_where_that_is_wanted(project: Project) -> None:
    outputs = project.directory / "outputs"
    said = cancel(project.start("--wait", "--stop-on-cancel", "--outputs", str(outputs)))
    said.assert_refused(130, "Cancelled", "was asked to save and end")
    assert outputs.read_text().startswith(f"outcome=interrupted\nrun_id={project.run_id}\n")
    wait_for(lambda: attempt_end(project.store, project.run_id, 1) is not None, "the attempt's end")
    end = attempt_end(project.store, project.run_id, 1)
    assert end is not None
    assert (end["state"], "retrain was cancelled" in end["reason"]) == ("stopped", True)


def cancel(child: subprocess.Popen[str]) -> Said:
    """SIGTERM, once the run is watched."""
    assert child.stderr is not None
    first = child.stderr.readline()
    assert "attached" in first, first
    child.send_signal(signal.SIGTERM)
    return finish(child, timeout_s=WAIT_S)


def test_the_next_call_goes_on_to_the_version(project: Project) -> None:
    (project.directory / "fast").touch()
    outputs = project.directory / "outputs-2"
    answer = project.retrain("--wait", "--json", "--outputs", str(outputs)).assert_done().json
    version = f"{project.name}@1"
    assert (answer["outcome"], answer["run_id"], answer["version"]) == ("done", project.run_id, version)
    assert newest_attempt(project.store, project.run_id) == 2
    assert f"version={version}\n" in outputs.read_text()


def test_then_it_is_unchanged_wherever_the_cluster_is(project: Project) -> None:
    command = ("retrain", "run.yaml", "--target", "http://127.0.0.1:9", "--json")
    said = finish(start(*command, directory=project.directory, settings=project.settings)).assert_done()
    assert (said.json["outcome"], said.json["version"]) == ("unchanged", f"{project.name}@1")


def test_an_outage_of_s3_is_waited_for(project: Project) -> None:
    with FaultProxy(project.settings["AWS_ENDPOINT_URL"]) as proxy:
        proxy.add(Fault(kind=Kind.REFUSE, status=503, times=10**6))
        threading.Timer(OUTAGE_S, proxy.clear).start()
        began_s = time.monotonic()
        said = project.retrain("--json", AWS_ENDPOINT_URL=proxy.endpoint_url).assert_done()
    assert said.json["outcome"] == "unchanged"
    assert time.monotonic() - began_s > OUTAGE_S
    assert "fails; asked again in" in said.err


def test_new_data_is_a_new_run_and_a_dry_run_says_so(project: Project) -> None:
    project.store.at(project.store.bucket, project.name).upload("more.txt", b"a bad cab had a fad " * 50)
    answer: dict[str, Any] = json.loads(project.retrain("--dry-run", "--json").assert_done().out)
    assert (answer["outcome"], answer["previous"]) == ("submitted", project.run_id)
    assert answer["changed"] == {"data.train": "the source's files are others"}
    assert answer["cpu_hours"] > 0
    assert f"{STEPS:,} steps at the" in answer["estimate_basis"]
