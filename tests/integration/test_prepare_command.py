"""``headway prepare`` on one embedded stack, and what the commands say of the dataset that it makes.

The tests go in order: they are one dataset's way from a source that is bad to bytes that are damaged.
"""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from orchestrator.store import layout, open_store
from orchestrator.targets.base import JobState
from orchestrator.targets.jobs_api import JobsApiTarget
from orchestrator.targets.stack import Stack
from tests.command_line import Said, finish
from tests.integration.project import ProjectFolder, settings_of
from tests.integration.test_bad_days import put_corpus
from tests.tiny_run import TINY_LLAMA

WAIT_S = 120.0


class Project(ProjectFolder):
    """A folder with run files."""

    def headway(self, *arguments: str) -> Said:
        return finish(self.command(*arguments), timeout_s=WAIT_S)

    def prepare(self, run_file: str, *options: str) -> Said:
        return self.headway("prepare", run_file, "--target", self.target, *options)

    def write(self, file: str, **data: Any) -> None:
        run = {
            "apiVersion": "headway/v1",
            "name": self.name,
            "model": {"architecture": TINY_LLAMA},
            "data": {"vocab_size": 300, "eval_fraction": 0.2, "sequence_length": 32, **data},
            "train": {"steps": 1},
        }
        (self.directory / file).write_text(yaml.safe_dump(run))

    @property
    def reference(self) -> str:
        (fingerprint,) = [
            found
            for found in self.store.list_folders(layout.datasets(self.name))
            if self.store.exists(layout.dataset_manifest(self.name, found))
        ]
        return f"{self.name}@{fingerprint}"


@pytest.fixture(scope="module")
def project(
    stack: Stack, stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    with settings_of(stack_environment) as settings:
        found = Project(
            directory=tmp_path_factory.mktemp("project"),
            target=stack.dashboard_url,
            settings=settings,
            store=open_store(),
            name=f"prepare-{secrets.token_hex(2)}",
        )
        corpus = found.store.at(found.store.bucket, found.name)
        put_corpus(corpus)
        found.write("run.yaml", train=f"s3://{corpus.bucket}/{found.name}/*.txt")
        yield found


def test_one_leaves_another_attaches_and_is_told_what_is_wrong(project: Project) -> None:
    corpus = project.store.at(project.store.bucket, project.name)
    for number in range(20):
        corpus.upload(f"bad/{number}.jsonl", b'{"text": "fine"}\n{"no": "json"\n')
    project.write("bad.yaml", train=f"s3://{corpus.bucket}/{project.name}/bad/*.jsonl", format="jsonl")
    first = project.command("prepare", "bad.yaml", "--target", project.target)
    assert first.stderr is not None
    said = first.stderr.readline()
    assert " submitted as data-" in said
    job = said.split()[-1]
    first.send_signal(signal.SIGINT)
    finish(first).assert_refused(130, f"{job} goes on").assert_next_step("--stop")

    second = project.prepare("bad.yaml")
    assert f"is being made by {job}; attached" in second.err
    second.assert_refused(1, "data: 20 of ", "(at most 1% may be)").assert_next_step("docs/data.md")


def test_it_makes_a_dataset_and_no_run(project: Project) -> None:
    made = project.prepare("run.yaml", "--json").assert_done()
    facts = made.json
    assert (facts["state"], facts["attached"]) == ("prepared", False)
    assert facts["dataset"] == project.reference
    assert facts["train_tokens"] > facts["eval_tokens"] > 0
    assert facts["num_bad_records"] == 0
    assert f"{project.reference} made in " in made.err  # the job's own last line
    assert [run for run in project.store.list_folders("runs/") if run.startswith(project.name)] == []
    job = JobsApiTarget(project.target).find(facts["submission_id"])
    assert job is not None
    assert job.state is JobState.SUCCEEDED
    print(f"prepared in {facts['seconds']} s")


def test_what_exists_is_told_at_once(project: Project) -> None:
    said = project.prepare("run.yaml").assert_done()
    assert said.out.startswith(f"{project.reference} exists already; nothing is sent.\n")


def test_it_is_listed_shown_and_verified(project: Project) -> None:
    rows = project.headway("list", "datasets", "--json").assert_done().json["datasets"]
    (row,) = [row for row in rows if row["dataset"] == project.reference]
    assert row["source"].endswith("/*.txt")
    shown = project.headway("show", project.reference, "--json").assert_done().json
    assert shown["splits"]["train"]["num_tokens"] == row["train_tokens"]
    name, _, fingerprint = project.reference.partition("@")
    address = project.store.uri_of(layout.dataset(name, fingerprint))
    for which in (name, address):
        verified = project.headway("verify", which, "--json").assert_done().json["verified"]
        assert sum(verified.values()) >= row["size_bytes"]


def test_damage_is_named(project: Project) -> None:
    name, _, fingerprint = project.reference.partition("@")
    shard = layout.dataset(name, fingerprint) + "train-00000.bin"
    content = bytearray(project.store.get(shard))
    content[-1] ^= 1
    project.store.upload(shard, bytes(content))
    said = project.headway("verify", project.reference, "--json")
    said.assert_refused(1, "train-00000.bin").assert_next_step("headway prepare")
    (fault,) = json.loads(said.out)["damaged"]["train-00000.bin"]
    assert "does not match its digest" in fault
