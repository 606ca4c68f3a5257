"""The CI files for real: their scripts as they are written, with an installation of the base package alone, a Ray
cluster, an S3 server, and a webhook that is told."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.store import Store, open_store
from orchestrator.targets.stack import Stack
from tests.ci_files import (
    GITLAB,
    ROOT,
    WORKFLOW,
    GitHubJob,
    action_contexts,
    action_step,
    gitlab_script,
    read,
    run_gitlab,
)
from tests.integration.receiver import Receiver, listening
from tests.tiny_run import TINY_LLAMA

PYTHON = Path(sys.executable)
SETTINGS = ("AWS_", "HEADWAY_", "RAY_", "GITHUB_", "CI")
INSTALL = "Install Headway"


@pytest.fixture(scope="module")
def store(stack: Stack) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.store_environment().items():
            patch.setenv(name, value)
        yield open_store()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with listening(Receiver()) as found:
        yield found


@pytest.fixture(scope="module")
def job(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> GitHubJob:
    """A job whose repository has its run files in the folder ``models``, and where Headway is installed."""
    folder = tmp_path_factory.mktemp("github")
    (folder / "workspace" / "models").mkdir(parents=True)
    (folder / "temp").mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    found = GitHubJob(
        workspace=folder / "workspace", temp=folder / "temp", environ={**environ, **stack.store_environment()}
    )
    contexts = action_contexts({"extra": ""}, python=PYTHON)
    path = str(ROOT / ".github" / "actions" / "retrain")
    done = found.step(action_step(INSTALL), contexts, GITHUB_ACTION_PATH=path)
    assert done.code == 0, done.log
    return found


def inputs(stack: Stack, run_file: str = "run.yaml", **others: str) -> dict[str, str]:
    return {
        "run-file": run_file,
        "working-directory": "models",
        "target": stack.dashboard_url,
        "extra": "",
        "timeout": "240",
        **others,
    }


def write_run_file(job: GitHubJob, receiver: Receiver, name: str = "run.yaml", **changes: Any) -> None:
    document: dict[str, Any] = {
        "apiVersion": "headway/v1",
        "name": "ci-lm",
        "model": {"architecture": TINY_LLAMA},
        "data": {
            "train": "s3://headway/ci-corpus/*.txt", "vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32,
        },
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 4},
        "notify": {"webhook": receiver.url},
        **changes,
    }  # fmt: skip
    (job.workspace / "models" / name).write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def corpus(store: Store) -> None:
    words = random.Random(5)
    for number in range(20):
        text = " ".join("".join(words.choices("abcdefgh", k=5)) for _ in range(300))
        store.at(store.bucket, "ci-corpus").upload(f"{number:03d}.txt", text.encode())


def test_the_install_step_installs_this_repositorys_base_package(job: GitHubJob) -> None:
    python = job.temp / "headway" / "bin" / "python"
    program = "import importlib.metadata; print(*(each.name.lower() for each in importlib.metadata.distributions()))"
    names = set(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert "headway" in names
    assert not names & {"ray", "torch", "transformers", "kubernetes"}


@pytest.mark.full
@pytest.mark.usefixtures("corpus")
def test_a_cancelled_job_lets_go_and_the_next_one_sees_the_run_to_its_end(
    job: GitHubJob, stack: Stack, receiver: Receiver
) -> None:
    write_run_file(job, receiver)
    step = action_step("Retrain")
    child = job.start(step, action_contexts(inputs(stack), python=PYTHON))
    assert child.stdout is not None
    said = ""
    while "submitted as" not in said:
        line = child.stdout.readline()
        assert line, said
        said += line
    child.send_signal(signal.SIGINT)  # what GitHub's runner sends first, to the step's own process
    cancelled = job.finish(step, child, said=said)
    assert (cancelled.code, cancelled.outputs["outcome"]) == (130, "interrupted"), cancelled.log
    assert "goes on." in cancelled.log

    quick = job.action(inputs(stack, wait="false"), python=PYTHON, skip=(INSTALL,))
    assert quick["Retrain"].outputs["outcome"] == "attached", quick["Retrain"].log
    assert quick["Tell"].commands == [f"::notice title=Headway%3A attached::{cancelled.outputs['run_id']}"]
    assert quick["Tell"].summary == f"## {cancelled.outputs['run_id']}: attached\n\n"

    ran = job.action(inputs(stack), python=PYTHON, skip=(INSTALL,))
    retrained, told = ran["Retrain"], ran["Tell"]
    assert retrained.code == told.code == 0, retrained.log + told.log
    outputs = retrained.outputs
    assert outputs == {"outcome": "done", "run_id": cancelled.outputs["run_id"], "version": "", "changed": ""}
    assert "attached" in retrained.log
    assert told.commands == [f"::notice title=Headway%3A done::{outputs['run_id']}"]
    assert told.summary.startswith(f"## {outputs['run_id']}: done\n")
    assert len(told.summary.splitlines()) > 10  # the report's figures follow
    assert [(body["event"], body["run_id"]) for body in receiver.bodies()] == [("done", outputs["run_id"])]
    assert receiver.bodies()[0]["figures"]["loss"] > 0


@pytest.mark.full
@pytest.mark.usefixtures("corpus")
def test_the_same_again_is_unchanged(job: GitHubJob, stack: Stack, receiver: Receiver) -> None:
    no_part_of_what_it_is_made_of: dict[str, Any] = {"gate": {"max_loss": 50.0}, "resources": {"max_failures": 1}}
    write_run_file(job, receiver, **no_part_of_what_it_is_made_of)
    ran = job.action(inputs(stack), python=PYTHON, skip=(INSTALL,))
    assert ran["Retrain"].code == 0, ran["Retrain"].log
    assert ran["Retrain"].outputs["outcome"] == "unchanged"
    assert ran["Tell"].commands == [f"::notice title=Headway%3A unchanged::{ran['Retrain'].outputs['run_id']}"]
    assert len(receiver.got) == 1


@pytest.mark.full
@pytest.mark.usefixtures("corpus")
def test_a_refusal_fails_the_job_and_says_why(job: GitHubJob, stack: Stack, receiver: Receiver) -> None:
    train = {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4}
    notify = {"webhook": receiver.url, "stalled_minutes": 0.02}  # a second, and the workers take longer to start
    write_run_file(job, receiver, "strict.yaml", train=train, gate={"max_loss": 0.5}, notify=notify)
    ran = job.action(inputs(stack, "strict.yaml"), python=PYTHON, skip=(INSTALL,))
    retrained, told = ran["Retrain"], ran["Tell"]
    assert (retrained.code, told.code) == (3, 0), retrained.log
    assert (retrained.outputs["outcome"], retrained.outputs["changed"]) == ("refused", "train.steps")
    (annotation,) = told.commands
    assert annotation.startswith(
        f"::error title=Headway%3A refused::{retrained.outputs['run_id']} was refused by the gate"
    )
    assert "is above" in annotation
    assert "is above" in told.summary.splitlines()[2]
    stalled, refused = receiver.bodies()[-2:]
    assert (stalled["event"], stalled["figures"]["step"], refused["event"]) == ("stalled", 0, "refused")
    assert "is above" in refused["reason"]


def test_a_bad_run_file_is_annotated(job: GitHubJob, stack: Stack, receiver: Receiver) -> None:
    write_run_file(job, receiver, "bad.yaml", train={"steps": 0})
    ran = job.action(inputs(stack, "bad.yaml"), python=PYTHON, skip=(INSTALL,))
    assert (ran["Retrain"].code, ran["Retrain"].outputs["outcome"]) == (2, "error")
    (annotation,) = ran["Tell"].commands
    assert annotation.startswith(
        "::error title=Headway%3A error,file=models/bad.yaml::bad.yaml: train.steps: 0 is refused"
    )
    assert "train.steps: 0 is refused" in ran["Tell"].summary


@pytest.mark.parametrize("name", ['x.yaml"; touch ran; echo "', "$(touch ran)", "--fresh", "x\n::error::y"])
def test_an_input_is_a_value_and_no_program(job: GitHubJob, stack: Stack, name: str) -> None:
    ran = job.action(inputs(stack, name), python=PYTHON, skip=(INSTALL,))
    assert ran["Retrain"].code == 2
    assert not (job.workspace / "models" / "ran").exists()
    assert len(ran["Tell"].commands) == 1


def test_where_the_installation_failed_nothing_is_told(job: GitHubJob, stack: Stack) -> None:
    ran = job.action(inputs(stack, version="not-a-version!"), python=PYTHON)
    assert ran[INSTALL].code != 0
    assert "Retrain" not in ran
    assert (ran["Tell"].code, ran["Tell"].commands, ran["Tell"].summary) == (0, [], "")


def test_the_workflows_own_scripts(job: GitHubJob, tmp_path: Path) -> None:
    """With a program in the place of AWS's, which writes down how it was called."""
    aws = tmp_path / "aws"
    aws.write_text('#!/bin/sh\necho "$@"\n')
    aws.chmod(0o755)
    (steps,) = [each["steps"] for each in read(WORKFLOW)["jobs"].values()]
    scripts = {step["name"]: step for step in steps if "run" in step}
    contexts = {
        "vars": {"EKS_CLUSTER": "gpus; touch ran"},
        "steps": {"retrain": {"outputs": {"run-id": "demo-1", "version": "demo@3", "outcome": "done"}}},
    }
    path = f"{tmp_path}{os.pathsep}{job.environ['PATH']}"
    found = job.step(scripts["Find the cluster"], contexts, PATH=path, HOME=str(tmp_path))
    assert (found.code, found.log) == (
        0,
        f"eks update-kubeconfig --name gpus; touch ran --kubeconfig {tmp_path}/.kube/config\n",
    )
    said = job.step(scripts["Say what is released"], contexts)
    assert (said.code, said.log) == (0, "demo-1 released demo@3\n")


# -- GitLab


@pytest.mark.full
@pytest.mark.usefixtures("corpus")
def test_gitlabs_job_hands_on_what_came_out(job: GitHubJob, stack: Stack, receiver: Receiver) -> None:
    """After the tests above, which trained this very run."""
    write_run_file(job, receiver)
    project, gitlab = job.workspace / "models", read(GITLAB)
    variables = {name: value for name, value in gitlab["variables"].items() if name != "AWS_REGION"}
    environ = {
        **variables,
        **job.environ,
        "PATH": f"{PYTHON.parent}{os.pathsep}{job.environ['PATH']}",
        "CI_BUILDS_DIR": str(job.temp),
        "CI_PROJECT_DIR": str(project),
        "CI_JOB_ID": "17",
        "AWS_TOKEN": "a.b.c",
        "HEADWAY_PACKAGE": str(ROOT),
        "HEADWAY_TARGET": stack.dashboard_url,
    }
    script = gitlab_script(gitlab["retrain"], "before_script", "script")
    done = run_gitlab(script, directory=project, environ=environ)
    assert done.returncode == 0, done.stdout
    values = dict(line.split("=", 1) for line in (project / "headway.env").read_text().splitlines())
    assert values["outcome"] == "unchanged"
    assert values["run_id"].startswith("ci-lm-")
    assert (job.temp / "aws-token").read_text() == "a.b.c"
    assert (job.temp / "aws-token").stat().st_mode & 0o077 == 0
    assert values["run_id"] in (project / "headway-report.html").read_text()
    (project / "headway.env").unlink()

    write_run_file(job, receiver, "bad.yaml", train={"steps": 0})
    only = gitlab_script(gitlab["retrain"], "script")
    for shell in ("bash", "sh"):
        bad = run_gitlab(only, directory=project, environ={**environ, "HEADWAY_RUN_FILE": "bad.yaml"}, shell=shell)
        assert bad.returncode == 2, bad.stdout
        assert "outcome=error" in (project / "headway.env").read_text()
