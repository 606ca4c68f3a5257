"""``headway prepare``: what is sent, who attaches, what is told of the end; with a target that stands for a cluster."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands import prepare as command
from orchestrator.commands.follow_job import Followed, follow
from orchestrator.commands.list_datasets import list_datasets
from orchestrator.commands.prepare import Wanted, await_dataset, check_preparable, find_wanted, send, stop_job
from orchestrator.errors import (
    AttemptFailed,
    EnvironmentUnusable,
    HeadwayError,
    Interrupted,
    SpecError,
    TargetError,
    UsageError,
)
from orchestrator.record.logs import LogFile, LogWriter
from orchestrator.render import job_request
from orchestrator.reporter import Reporter
from orchestrator.spec import parse
from orchestrator.targets.base import JobState, JobStatus
from orchestrator.targets.kubernetes.target import KubernetesTarget
from tests.unit.commands.datasets import FINGERPRINT, NAME, REFERENCE, put_dataset
from tests.unit.commands.test_submit import (
    FAILED,
    GOING,
    HOPELESS,
    QUEUED,
    SUCCEEDED,
    FakeTarget,
    RacedTarget,
    document,
    folder,
    spec_of,
)
from tests.unit.commands.test_submit import _no_aws as _no_aws
from tests.unit.fakes import MemoryStore
from tests.unit.render.requests import preparation, settings
from tests.unit.targets.test_kubernetes_target import FakeClient

__all__ = ["folder"]
WANTED = Wanted(name=NAME, fingerprint=FINGERPRINT)
JOB, AGAIN = f"data-{NAME}-{FINGERPRINT[:8]}", "headway prepare run.yaml"


def sent(folder: Path, store: MemoryStore, target: FakeTarget, reporter: Reporter | None = None) -> command.Sent:
    return send(
        spec_of(folder), folder / "run.yaml", store, target, reporter or Reporter(), wanted=WANTED, directory=folder
    )


# -- what is wrong with a run file


def test_a_dataset_that_was_prepared_before_leaves_nothing_to_prepare() -> None:
    with pytest.raises(SpecError, match=r"data\.dataset 'text' is prepared already"):
        check_preparable(parse(document(data={"dataset": "text"})))


def test_conversations_need_a_pretrained_model() -> None:
    with pytest.raises(SpecError, match="needs the chat template"):
        check_preparable(parse(document(data={"train": "s3://b/**", "format": "messages"})))


def test_what_is_wanted_follows_the_source(memory_store: MemoryStore, folder: Path) -> None:
    spec = spec_of(folder)
    wanted = find_wanted(spec, memory_store, folder)
    assert (wanted.name, len(wanted.fingerprint)) == (spec.name, 16)
    assert find_wanted(spec, memory_store, folder) == wanted
    (folder / "data" / "0.txt").write_text("other")
    assert find_wanted(spec, memory_store, folder) != wanted


# -- sending


def test_what_is_sent(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    found = sent(folder, memory_store, target)
    assert (found.submission_id, found.attached) == (JOB, False)
    ((request, package),) = target.sent
    assert package is not None
    job = request.manifest
    assert job["spec"]["entrypoint"] == "headway prepare run.yaml --here"
    assert job["spec"]["metadata"]["headway_dataset"] == REFERENCE
    assert job["spec"]["backoffLimit"] == 0
    assert job["metadata"]["labels"].items() >= {
        "headway.dev/dataset": NAME, "headway.dev/fingerprint": FINGERPRINT
    }.items()  # fmt: skip
    assert "headway.dev/run" not in job["metadata"]["labels"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "lifecycle" not in head["containers"][0]
    (logs,) = [each["command"] for each in head["initContainers"] if each["name"] == "logs"]
    assert logs[:5] == ["headway", "pod", "ship-logs", "--run", REFERENCE]


def test_no_run_is_made_in_the_store(memory_store: MemoryStore, folder: Path) -> None:
    sent(folder, memory_store, FakeTarget())
    assert [key for key in memory_store.objects if not key.startswith(("probe/", "code/"))] == []


def test_as_a_job_of_rays_own() -> None:
    assert job_request(preparation(repeat=2, package_digest=None)).body() == {
        "submission_id": "data-code-lm-01234567-2",
        "entrypoint": "headway prepare run.yaml --here",
        "runtime_env": {"env_vars": {"HEADWAY_STORE": "s3://bucket/prefix"}},
        "metadata": {"headway_dataset": "code-lm@0123456789abcdef", "headway_version": "0.1.0"},
    }


@pytest.mark.parametrize("status", [QUEUED, GOING, HOPELESS])
def test_a_second_one_attaches(memory_store: MemoryStore, folder: Path, status: JobStatus) -> None:
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    target.jobs[JOB] = status
    second = sent(folder, memory_store, target)
    assert (first.attached, second.attached, second.submission_id) == (False, True, JOB)
    assert len(target.sent) == 1


def test_of_two_at_once_one_is_told_that_it_is_attached(
    memory_store: MemoryStore, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sent(folder, memory_store, RacedTarget()).attached
    assert f"{REFERENCE} was submitted by another just now; attached as {JOB}" in capsys.readouterr().err


@pytest.mark.parametrize("ended", [FAILED, SUCCEEDED])
def test_a_job_that_has_ended_is_followed_by_a_new_one(
    memory_store: MemoryStore, folder: Path, ended: JobStatus
) -> None:
    target = FakeTarget()
    target.jobs = {JOB: ended, f"{JOB}-1": ended}
    assert sent(folder, memory_store, target).submission_id == f"{JOB}-2"


def test_a_run_file_outside_of_what_is_sent(memory_store: MemoryStore, folder: Path) -> None:
    with pytest.raises(SpecError, match="lies outside the working directory"):
        send(
            spec_of(folder), folder / "run.yaml", memory_store, FakeTarget(), Reporter(),
            wanted=WANTED, directory=folder / "data",
        )  # fmt: skip


def test_stopping_ends_the_job_in_flight() -> None:
    target = FakeTarget()
    target.jobs = {JOB: FAILED, f"{JOB}-1": GOING}
    facts, text = stop_job(WANTED, target, again=AGAIN)
    assert (facts["state"], target.stopped) == ("stopped", [f"{JOB}-1"])
    assert AGAIN in text
    assert stop_job(WANTED, target, again=AGAIN)[0]["state"] == "idle"


# -- following


def awaited(store: MemoryStore, target: Any, *steps: Callable[[], None]) -> Any:
    """Follow while the steps happen, one at each poll."""
    left = list(steps)

    def sleep(_seconds: float) -> None:
        assert left, "it waits for what never comes"
        left.pop(0)()

    return await_dataset(WANTED, JOB, store, target, Reporter(), again=AGAIN, sleep=sleep)


def test_its_log_is_told_line_by_line_and_the_dataset_returned(
    memory_store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    target = FakeTarget()
    target.jobs[JOB] = QUEUED

    def starts() -> None:
        target.jobs[JOB] = GOING
        target.log = "prepare …\n3 of 9 pa"

    def goes_on() -> None:
        target.log = "prepare …\n3 of 9 parts\n"

    def ends() -> None:
        target.log = "prepare …\n3 of 9 parts\nmade"
        put_dataset(memory_store)
        target.jobs[JOB] = SUCCEEDED

    made = awaited(memory_store, target, lambda: None, starts, goes_on, ends)
    assert (made.name, made.fingerprint) == (NAME, FINGERPRINT)
    assert capsys.readouterr().err.splitlines() == ["waiting: queued", "prepare …", "3 of 9 parts", "made"]


def test_on_kubernetes_its_log_lies_with_the_dataset(
    memory_store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = FakeClient()
    target = KubernetesTarget(settings(), lambda: memory_store, client=client)
    target.submit(target.render(preparation(dataset=NAME, store_uri=memory_store.uri)))
    client.objects[JOB]["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    driver = LogFile(pod="head", session="session_1", name=f"job-driver-{JOB}.log")
    LogWriter(memory_store, REFERENCE, driver).append(b"prepare \xe2\x80\xa6\n")
    assert any(key.startswith(f"datasets/{NAME}/{FINGERPRINT}/logs/head/") for key in memory_store.objects)
    put_dataset(memory_store)
    assert awaited(memory_store, target).fingerprint == FINGERPRINT
    assert capsys.readouterr().err == "prepare …\n"
    (row,) = list_datasets(memory_store)
    assert row["problem"] is None


def test_one_that_another_made_meanwhile_is_made(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = FAILED
    put_dataset(memory_store)
    assert awaited(memory_store, target).fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    ("status", "log", "kind", "words", "next_step"),
    [
        (
            JobStatus(state=JobState.FAILED, message="", exit_code=1),
            "x\nheadway: data: 9 of 10 records cannot be used.\n  → Correct them.\n",
            AttemptFailed,
            f"{REFERENCE}: data: 9 of 10 records cannot be used.",
            "Correct them.",
        ),
        (JobStatus(state=JobState.FAILED, message="", exit_code=2), "headway: no\n", UsageError, "no", AGAIN),
        (JobStatus(state=JobState.FAILED, message="it broke", exit_code=4), "", EnvironmentUnusable, "it broke", AGAIN),
        (JobStatus(state=JobState.STOPPED, message=""), "", Interrupted, "was stopped", AGAIN),
        (SUCCEEDED, "", AttemptFailed, "is not there, though its job ended as SUCCEEDED", AGAIN),
        (None, "", AttemptFailed, "no longer knows its job", AGAIN),
    ],
)
def test_an_end_without_a_dataset(
    memory_store: MemoryStore,
    status: JobStatus | None,
    log: str,
    kind: type[HeadwayError],
    words: str,
    next_step: str,
) -> None:
    target = FakeTarget()
    target.log = log
    if status is not None:
        target.jobs[JOB] = status
    with pytest.raises(kind, match=words) as caught:
        awaited(memory_store, target)
    assert type(caught.value) is kind
    assert next_step in caught.value.next_step


def test_what_can_never_start_is_stopped_and_told(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = HOPELESS
    with pytest.raises(EnvironmentUnusable, match=r"cannot be made: .*This image holds Headway"):
        awaited(memory_store, target)
    assert target.stopped == [JOB]


def test_the_jobs_own_error_is_told_once(memory_store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    target = FakeTarget()
    target.log = "prepare …\nheadway: S3 is down.\n  → Mend it.\n"
    target.jobs[JOB] = FAILED
    with pytest.raises(AttemptFailed):
        awaited(memory_store, target)
    assert capsys.readouterr().err == "prepare …\n"


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"{JOB} goes on") as caught:
        awaited(memory_store, target, interrupt)
    assert f"{AGAIN} --stop" in caught.value.next_step
    assert target.stopped == []


def test_and_so_does_one_while_it_is_sent(memory_store: MemoryStore, folder: Path) -> None:
    class Impatient(Reporter):
        def say(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"{JOB} goes on") as caught:
        sent(folder, memory_store, FakeTarget(), Impatient())
    assert "run.yaml --stop" in caught.value.next_step


def test_a_target_that_is_away_for_a_while_is_asked_again() -> None:
    target = FakeTarget()
    target.jobs[JOB] = SUCCEEDED
    target.fails = TargetError("away")
    now = 0.0

    def back(seconds: float) -> None:
        nonlocal now
        now += 60.0
        if now >= 120.0:
            target.fails = None

    found = follow(JOB, REFERENCE, target, Reporter(), sleep=back, clock=lambda: now)
    assert found == Followed(status=SUCCEEDED, log="")

    def never(seconds: float) -> None:
        nonlocal now
        now += 60.0

    target.fails = TargetError("away")
    with pytest.raises(TargetError, match="away"):
        follow(JOB, REFERENCE, target, Reporter(), sleep=never, clock=lambda: now)


def test_a_log_that_takes_long_to_read_is_read_less_often_and_its_end_is_not_missed() -> None:
    now = 0.0
    reads: list[float] = []

    class Slow(FakeTarget):
        def logs(self, run_id: str, submission_id: str) -> str:
            nonlocal now
            now += 2.0
            reads.append(now)
            return self.log

    target = Slow()
    target.jobs[JOB] = GOING

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 50.0:
            target.jobs[JOB] = SUCCEEDED

    found = follow(JOB, REFERENCE, target, Reporter(), sleep=sleep, clock=lambda: now)
    assert found.status == SUCCEEDED
    assert [round(after - before) >= 18 for before, after in pairwise(reads[:-1])] == [True, True]
    assert reads[-1] < 56.0
