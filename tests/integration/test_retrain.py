"""``headway retrain`` as CI calls it, on one embedded stack: many at once, killed, cancelled, and through an outage.

The tests go in order: they are one change's way from the first call to the version.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from tests.integration.test_bad_days import put_corpus
from tests.tiny_run import TINY_LLAMA

WAIT_S = 500.0  # ends what hangs, and measures nothing
AT_ONCE = 20
STEPS = 200
HELD_TASK = """
import time
from pathlib import Path

from workloads.tasks.causal_lm import CausalLM


class HeldTask(CausalLM):
    num_steps = 0

    def loss_sum(self, model, batch):
        self.num_steps += 1
        while self.num_steps > 2 and Path({held!r}).exists():
            time.sleep(0.1)
        return super().loss_sum(model, batch)
"""
"""Stays in its third step for as long as a file is there: so the run is in flight until a test lets it go on."""


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

    @property
    def held(self) -> Path:
        """While this file is there, the run does not get past its third step."""
        return self.directory / "held"

    def wait_for_event(self, kind: str) -> None:
        def came() -> bool:
            return any(event["kind"] == kind for event in EventReader(self.store, self.run_id).poll())

        wait_for(came, f"an event {kind!r}")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    assert processes.wait_until(condition, timeout_s=WAIT_S, ended=lambda: False), f"{what} did not come"


@pytest.fixture(scope="module")
def project(
    stack: Stack, stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    directory, name = tmp_path_factory.mktemp("project"), f"retrain-{secrets.token_hex(2)}"
    (directory / "held_task.py").write_text(HELD_TASK.format(held=str(directory / "held")))
    with settings_of(stack_environment) as settings:
        store = open_store()
        put_corpus(store.at(store.bucket, name))
        run = {
            "apiVersion": "headway/v1",
            "name": name,
            "task": "held_task:HeldTask",
            "model": {"architecture": TINY_LLAMA},
            "data": {
                "train": f"s3://{store.bucket}/{name}/*.txt",
                "vocab_size": 300,
                "eval_fraction": 0.2,
                "sequence_length": 32,
            },
            "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "step_timeout": 3000.0},
            "checkpoint": {"every_steps": 8},
            "gate": {"max_eval_samples": 64},
            "release": {"model": name},
        }
        (directory / "run.yaml").write_text(yaml.safe_dump(run))
        project = Project(directory=directory, target=stack.dashboard_url, settings=settings, store=store, name=name)
        project.held.touch()
        yield project
        project.held.unlink(missing_ok=True)  # whatever failed, the stack is others' as well


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
    project.wait_for_event("step")
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
    project.wait_for_event("stopping")
    project.held.unlink()
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
    """It ends once the command has said that it waits. The retries outlast a minute as well:
    tests/unit/store/test_client.py adds them up."""
    with FaultProxy(project.settings["AWS_ENDPOINT_URL"]) as proxy:
        proxy.add(Fault(kind=Kind.REFUSE, status=503, times=10**6))
        child = project.start("--json", AWS_ENDPOINT_URL=proxy.endpoint_url)
        assert child.stderr is not None
        assert any("fails; asked again in" in line for line in child.stderr), "it did not wait"
        proxy.clear()
        said = finish(child, timeout_s=WAIT_S).assert_done()
    assert said.json["outcome"] == "unchanged"


def test_new_data_is_a_new_run_and_a_dry_run_says_so(project: Project) -> None:
    project.store.at(project.store.bucket, project.name).upload("more.txt", b"a bad cab had a fad " * 50)
    answer: dict[str, Any] = json.loads(project.retrain("--dry-run", "--json").assert_done().out)
    assert (answer["outcome"], answer["previous"]) == ("submitted", project.run_id)
    assert answer["changed"] == {"data.train": "the source's files are others"}
    assert answer["cpu_hours"] > 0
    assert f"{STEPS:,} steps at the" in answer["estimate_basis"]
