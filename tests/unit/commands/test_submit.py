"""Sending, attaching and watching, with a target that stands for a cluster and no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.commands import submit
from orchestrator.commands.logs import stop_run
from orchestrator.commands.request import build_request, free_repeat
from orchestrator.commands.show import resolve_submitted
from orchestrator.commands.submit import in_flight, send
from orchestrator.commands.watch import Watched, watch
from orchestrator.errors import (
    AttemptFailed,
    EnvironmentUnusable,
    HeadwayError,
    Interrupted,
    SpecError,
    StoreError,
    TargetError,
    TimedOut,
    UsageError,
)
from orchestrator.package import Package
from orchestrator.record import EventLog
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.render import AttemptRequest, RayJobRequest, ray_job
from orchestrator.reporter import Reporter
from orchestrator.runs import identify, identity_of
from orchestrator.spec import ResourcesSpec, RunSpec, parse
from orchestrator.starter import STARTER
from orchestrator.store import Attempt, claim_attempt
from orchestrator.store.attempts import end_attempt
from orchestrator.targets.base import Capacity, JobState, JobStatus, Submission
from orchestrator.targets.kubernetes.client import KubernetesClient
from orchestrator.targets.kubernetes.target import KubernetesTarget
from tests.unit.fakes import MemoryStore
from tests.unit.render.requests import settings
from tests.unit.targets.test_kubernetes_target import FakeClient

Step = Callable[[], None]
GOING, QUEUED = JobStatus(state=JobState.RUNNING, message=""), JobStatus(state=JobState.PENDING, message="queued")
FAILED = JobStatus(state=JobState.FAILED, message="it broke", exit_code=1)
SUCCEEDED = JobStatus(state=JobState.SUCCEEDED, message="")
HELD = JobStatus(state=JobState.STOPPED, message="it was deleted; 2 of its pods are being ended", holds=True)
NO_CODE = "head pod x cannot use the code: This image holds Headway 0.1.0"
HOPELESS = JobStatus(state=JobState.FAILED, message=NO_CODE, exit_code=4, hopeless=True)


class FakeTarget:
    """Jobs by id. It starts them again after a failure, or not."""

    flag = " --target kubernetes"

    def __init__(self, *, restarts_jobs: bool = True) -> None:
        self.restarts_jobs = restarts_jobs
        self.jobs: dict[str, JobStatus] = {}
        self.sent: list[tuple[RayJobRequest, Package | None]] = []
        self.stopped: list[str] = []
        self.leaves: list[JobStatus] = []
        """What a job that is stopped is found as, one state at each look, before it is gone."""
        self.fails: HeadwayError | None = None
        self.log = ""

    def capacity(self, resources: ResourcesSpec) -> Capacity:
        return Capacity(num_cpus=8, num_gpus=0, memory_bytes=None, gpu_kind=None)

    def render(self, attempt: AttemptRequest) -> RayJobRequest:
        return ray_job(attempt, settings())

    def submit(self, request: RayJobRequest, package: Package | None = None) -> Submission:
        self.sent.append((request, package))
        created = request.submission_id not in self.jobs
        self.jobs.setdefault(request.submission_id, QUEUED)
        return Submission(submission_id=request.submission_id, created=created)

    def find(self, submission_id: str) -> JobStatus | None:
        if self.fails is not None:
            raise self.fails
        if submission_id in self.stopped and self.leaves:
            return self.leaves.pop(0)
        return self.jobs.get(submission_id)

    def runs(self) -> dict[str, str]:
        return {request.manifest["metadata"]["labels"]["headway.dev/run"]: job for job, request in self.by_id().items()}

    def by_id(self) -> dict[str, RayJobRequest]:
        return {request.submission_id: request for request, _ in self.sent if request.submission_id in self.jobs}

    def logs(self, run_id: str, submission_id: str) -> str:
        return self.log

    def follow(self, run_id: str, submission_id: str) -> Iterator[str]:
        yield self.log

    def stop(self, submission_id: str) -> bool:
        self.stopped.append(submission_id)
        return self.jobs.pop(submission_id, None) is not None


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """These credentials are no AWS account's, so STS is not asked whose they are."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document()))
    (tmp_path / "data").mkdir()
    for number in range(20):
        (tmp_path / "data" / f"{number}.txt").write_text("text")
    return tmp_path


def document(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(STARTER), **changes}


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    data = {"train": str(folder / "data" / "*.txt")}
    return parse(document(data=data, **changes))


def run_id(folder: Path, store: MemoryStore) -> str:
    return identify(spec_of(folder), store, folder).run_id


def sent(folder: Path, store: MemoryStore, target: FakeTarget, *, retry: bool = False) -> Any:
    return send(spec_of(folder), folder / "run.yaml", store, target, Reporter(), directory=folder, retry=retry)


def claimed(store: MemoryStore, run: str, job: str, state: str | None = None, *, host: str = "here") -> Attempt:
    attempt = claim_attempt(store, run, facts={"job": job, "host": host})
    if state is not None:
        end_attempt(store, attempt, state=state, reason="it was so")
    return attempt


# -- one object


def test_plan_prints_what_submit_sends(memory_store: MemoryStore, folder: Path) -> None:
    client: Any = FakeClient()
    target = KubernetesTarget(settings(), lambda: memory_store, client=client)
    spec = spec_of(folder, env={"NCCL_DEBUG": "INFO"}, secrets=["hub-token"])
    planned = build_request(spec, folder / "run.yaml", memory_store, target, directory=folder)
    found = send(spec, folder / "run.yaml", memory_store, target, Reporter(), directory=folder)
    assert client.objects == {found.submission_id: planned.request.body()}
    assert f"code/{planned.package.digest}.zip" in memory_store.objects


def test_planning_sends_and_stores_nothing(memory_store: MemoryStore, folder: Path) -> None:
    client: Any = FakeClient()
    target = KubernetesTarget(settings(), lambda: memory_store, client=client)
    build_request(spec_of(folder), folder / "run.yaml", memory_store, target, directory=folder)
    assert (client.objects, memory_store.objects) == ({}, {})


def test_what_the_run_file_asks_for_is_in_the_request(memory_store: MemoryStore, folder: Path) -> None:
    spec = spec_of(folder, env={"NCCL_DEBUG": "INFO"}, secrets=["hub-token"])
    prepared = build_request(spec, folder / "run.yaml", memory_store, FakeTarget(), directory=folder)
    assert prepared.attempt == 1
    job = prepared.request.body()
    ray = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in ray["env"]
    assert {"secretRef": {"name": "hub-token"}} in ray["envFrom"]
    assert job["metadata"]["annotations"]["headway.dev/store"] == memory_store.uri


def test_a_run_file_outside_of_what_is_sent(memory_store: MemoryStore, folder: Path) -> None:
    with pytest.raises(SpecError, match="lies outside the working directory"):
        build_request(spec_of(folder), folder / "run.yaml", memory_store, FakeTarget(), directory=folder / "data")


def test_an_id_that_an_ended_job_has_is_not_taken_again(memory_store: MemoryStore, folder: Path) -> None:
    target, run = FakeTarget(), run_id(folder, memory_store)
    target.jobs = {f"{run}-00001": FAILED, f"{run}-1-1": SUCCEEDED}
    assert free_repeat(target, run, 1) == 2
    assert sent(folder, memory_store, target).submission_id == f"{run}-1-2"


# -- a run that waits for its place, and is in no store yet


def test_it_is_found_by_its_id_and_by_its_name(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    found = sent(folder, memory_store, target)
    for name in (found.run_id, found.run_id.rpartition("-")[0]):
        assert resolve_submitted(memory_store, target, name) == found.run_id
    with pytest.raises(UsageError, match="There is no run 'other'"):
        resolve_submitted(memory_store, target, "other")


def test_its_source_may_grow(memory_store: MemoryStore, folder: Path) -> None:
    corpus = memory_store.at("corpus")
    corpus.upload("a.txt", b"text")
    spec = parse(document(data={"train": "s3://corpus/**"}))
    found = send(spec, folder / "run.yaml", memory_store, FakeTarget(), Reporter(), directory=folder)
    corpus.upload("b.txt", b"more")
    waited = identity_of(found.run_id, spec, memory_store, folder, edition=0)
    assert (waited.run_id, [file.path for file in waited.files]) == (found.run_id, ["a.txt"])


def test_a_listing_that_cannot_be_kept_stops_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class NoListing(MemoryStore):
        def create(self, key: str, data: bytes) -> None:
            if key.endswith("/source.json.gz"):
                raise StoreError("S3 answered AccessDenied.")
            super().create(key, data)

    store = NoListing()
    store.at("corpus").upload("a.txt", b"text")
    spec = parse(document(data={"train": "s3://corpus/**"}))
    assert not send(spec, folder / "run.yaml", store, FakeTarget(), Reporter(), directory=folder).attached
    said = capsys.readouterr().err
    assert "the source must not change until the run begins: S3 answered AccessDenied." in said


def test_it_is_stopped_without_a_request_that_would_stop_the_next_attempt(
    memory_store: MemoryStore, folder: Path
) -> None:
    target = FakeTarget()
    found = sent(folder, memory_store, target)
    facts, _ = stop_run(found.run_id, memory_store, target, timeout_s=5.0, reporter=Reporter())
    assert (facts["state"], target.stopped) == ("stopped", [found.submission_id])
    assert not [key for key in memory_store.objects if key.endswith("stop.json")]


def test_one_that_can_never_begin_is_ended_at_once(memory_store: MemoryStore, folder: Path) -> None:
    """Nobody would read a request to save and end."""
    target = FakeTarget()
    found = sent(folder, memory_store, target)
    claimed(memory_store, found.run_id, found.submission_id)
    target.jobs[found.submission_id] = HOPELESS
    facts, _ = stop_run(found.run_id, memory_store, target, timeout_s=5.0, reporter=Reporter())
    assert (facts["state"], target.stopped) == ("stopped", [found.submission_id])
    assert not [key for key in memory_store.objects if key.endswith("stop.json")]


# -- attaching


class RacedTarget(FakeTarget):
    """Another machine submits the same run just before."""

    def submit(self, request: RayJobRequest, package: Package | None = None) -> Submission:
        self.jobs[request.submission_id] = QUEUED
        return super().submit(request, package)


def test_of_two_that_submit_at_once_one_is_told_that_it_is_attached(
    memory_store: MemoryStore, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, words, attached in (
        (FakeTarget(), "submitted as", False),
        (RacedTarget(), "was submitted by another just now; attached as", True),
    ):
        found = sent(folder, memory_store, target)
        assert found.attached == attached
        assert f"{found.run_id} {words} {found.submission_id}\n" in capsys.readouterr().err


def test_a_second_submit_attaches_to_a_job_that_waits(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    first, second = sent(folder, memory_store, target), sent(folder, memory_store, target)
    assert (first.attached, second.attached) == (False, True)
    assert (second.submission_id, second.attempt) == (first.submission_id, 1)
    assert len(target.sent) == 1


def test_and_to_one_that_has_claimed_its_attempt(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id)
    second = sent(folder, memory_store, target)
    assert (second.submission_id, second.attached, second.attempt) == (first.submission_id, True, 1)


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_and_to_one_that_is_started_again_after_an_attempt(memory_store: MemoryStore, folder: Path, state: str) -> None:
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id, state)
    second = sent(folder, memory_store, target)
    assert (second.submission_id, second.attached, second.attempt) == (first.submission_id, True, 2)
    flight = in_flight(memory_store, target, first.run_id)
    assert flight is not None
    assert not flight.claimed


def test_where_jobs_are_not_started_again_an_ended_attempt_is_followed_by_a_new_job(
    memory_store: MemoryStore, folder: Path
) -> None:
    """Its job may take a moment longer to end."""
    target = FakeTarget(restarts_jobs=False)
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id, "failed")
    second = sent(folder, memory_store, target)
    assert (second.submission_id, second.attached) == (f"{first.run_id}-00002", False)


def test_a_job_that_has_ended_is_followed_by_a_new_one(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id, "failed")
    target.jobs[first.submission_id] = FAILED
    assert sent(folder, memory_store, target).submission_id == f"{first.run_id}-00002"


def test_a_retry_ends_the_job_in_flight_first(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id)
    second = sent(folder, memory_store, target, retry=True)
    assert target.stopped == [first.submission_id]
    assert (second.submission_id, second.attached, second.attempt) == (f"{first.run_id}-00002", False, 2)


def test_a_retry_waits_until_what_the_ended_job_held_is_given_back(
    memory_store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pods may still save, and their place is not free."""
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    claimed(memory_store, first.run_id, first.submission_id)
    target.leaves = [JobStatus(state=JobState.RUNNING, message="it is being ended"), HELD, HELD]
    sent(folder, memory_store, target, retry=True)
    assert target.leaves == []
    assert [request.submission_id for request, _ in target.sent] == [first.submission_id, f"{first.run_id}-00002"]


def test_one_that_can_never_begin_is_attached_to_until_it_is_stopped(memory_store: MemoryStore, folder: Path) -> None:
    """It holds its place and its pods as long as nobody deletes it."""
    target = FakeTarget()
    first = sent(folder, memory_store, target)
    target.jobs[first.submission_id] = HOPELESS
    assert sent(folder, memory_store, target).submission_id == first.submission_id
    assert len(target.sent) == 1
    again = sent(folder, memory_store, target, retry=True)
    assert target.stopped == [first.submission_id]
    assert (again.submission_id, again.attached) == (first.submission_id, False)


def test_a_run_with_an_outcome_is_not_sent(memory_store: MemoryStore, folder: Path) -> None:
    run, target = run_id(folder, memory_store), FakeTarget()
    done = Outcome(run_id=run, state="refused", reason="loss", attempt=1, ended_s=1.0)
    commit_outcome(memory_store, done)
    assert sent(folder, memory_store, target).outcome == done
    assert target.sent == []


# -- watching

RUN, JOB = "demo-1a2b3c4d", "demo-1a2b3c4d-00001"


def watched(store: MemoryStore, target: FakeTarget, *steps: Step) -> Watched:
    """Watch while the steps happen, one at each poll; after the last one nothing may be left to wait for."""
    left = list(steps)
    polls = 0

    def sleep(_seconds: float) -> None:
        nonlocal polls
        polls += 1
        if left:
            left.pop(0)()
        assert polls < len(steps) + 10, "it waits for what never comes"

    found = watch(RUN, JOB, store, target, Reporter(), from_attempt=1, sleep=sleep)
    assert not left
    return found


def attempt_ends(store: MemoryStore, state: str, exit_code: int) -> None:
    """An attempt of the job is claimed and ends."""
    attempt = claimed(store, RUN, JOB)
    log = EventLog(store, attempt, "pipeline")
    log.append("attempt_ended", state=state, reason=f"{state} {attempt.number}", exit_code=exit_code)
    log.close()
    end_attempt(store, attempt, state=state, reason=f"{state} {attempt.number}")


def done(store: MemoryStore) -> None:
    commit_outcome(store, Outcome(run_id=RUN, state="done", attempt=2, ended_s=1.0))


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, ""),
        (
            {"train.samples": 1200, "eval.samples": 40, "train.padding_tokens": 9},
            "1,200 samples to train on, 40 held out",
        ),
        (
            {
                "train.samples": 8,
                "train.truncated": 2,
                "eval.truncated": 1,
                "train.skipped_too_long": 3,
                "eval.skipped_too_long": 1,
                "skipped_not_json": 5,
            },
            "8 samples to train on, 0 held out; 3 cut to data.sequence_length; skipped: 5 not_json, 4 too_long",
        ),
        ({"skipped_unreadable_file": 2}, "skipped: 2 unreadable_file"),
    ],
)
def test_what_became_of_the_records_is_said(
    memory_store: MemoryStore, capsys: pytest.CaptureFixture[str], counts: dict[str, int], line: str
) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING

    def prepare() -> None:
        log = EventLog(memory_store, claimed(memory_store, RUN, JOB), "pipeline")
        log.append("dataset", fingerprint="0123456789abcdef", counts=counts)
        log.close()

    def succeed() -> None:
        done(memory_store)
        target.jobs[JOB] = SUCCEEDED

    watched(memory_store, target, prepare, lambda: None, succeed)
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_job_that_is_started_again_is_watched_on(memory_store: MemoryStore, state: str) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING

    def succeed() -> None:
        done(memory_store)
        target.jobs[JOB] = SUCCEEDED

    found = watched(memory_store, target, lambda: attempt_ends(memory_store, state, 1), lambda: None, succeed)
    assert found.require_outcome(RUN).state == "done"


def test_where_jobs_are_not_started_again_the_end_of_the_attempt_is_the_end(memory_store: MemoryStore) -> None:
    target = FakeTarget(restarts_jobs=False)
    target.jobs[JOB] = GOING
    found = watched(memory_store, target, lambda: attempt_ends(memory_store, "failed", 4))
    with pytest.raises(EnvironmentUnusable, match="failed 1"):
        found.require_outcome(RUN)


def test_the_last_attempt_says_why_there_is_no_outcome(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING

    def fail() -> None:
        attempt_ends(memory_store, "failed", 1)
        target.jobs[JOB] = FAILED

    found = watched(memory_store, target, lambda: attempt_ends(memory_store, "failed", 1), fail)
    with pytest.raises(AttemptFailed, match="failed 2"):
        found.require_outcome(RUN)


def test_an_earlier_attempts_end_is_not_told_of_a_later_one_that_died_without_a_word(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING

    def die() -> None:
        log = EventLog(memory_store, claimed(memory_store, RUN, JOB), "pipeline")
        log.append("stage_started", stage="train")
        log.close()
        target.jobs[JOB] = FAILED

    found = watched(memory_store, target, lambda: attempt_ends(memory_store, "failed", 1), die)
    with pytest.raises(AttemptFailed, match=r"without an outcome \(it broke\)"):
        found.require_outcome(RUN)


def test_what_can_never_start_is_stopped_and_told(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = HOPELESS
    found = watched(memory_store, target)
    assert target.stopped == [JOB]
    with pytest.raises(EnvironmentUnusable, match="cannot start: head pod x cannot use the code"):
        found.require_outcome(RUN)


@pytest.mark.parametrize(
    ("job", "log", "kind", "words"),
    [
        (JobStatus(state=JobState.STOPPED, message=""), "", Interrupted, "its job was stopped"),
        (FAILED, "", AttemptFailed, r"ended as FAILED without an outcome \(it broke\)"),
        (FAILED, "x\nheadway: S3 is down.\n", AttemptFailed, r"S3 is down"),
        (JobStatus(state=JobState.FAILED, message="", exit_code=4), "", EnvironmentUnusable, "ended as FAILED"),
        (SUCCEEDED, "headway: demo: 5 attempts failed\n", AttemptFailed, "5 attempts failed"),
        (None, "", AttemptFailed, "no longer knows its job"),
    ],
)
def test_an_end_without_an_outcome(
    memory_store: MemoryStore, job: JobStatus | None, log: str, kind: type[HeadwayError], words: str
) -> None:
    target = FakeTarget()
    target.log = log
    if job is not None:
        target.jobs[JOB] = job
    with pytest.raises(kind, match=words):
        watched(memory_store, target).require_outcome(RUN)


def test_what_to_type_next_names_the_target(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = FAILED
    for log in ("", "headway: S3 is down.\n"):
        target.log = log
        with pytest.raises(AttemptFailed) as failed:
            watched(memory_store, target).require_outcome(RUN)
        assert f"headway logs --target kubernetes {RUN}" in failed.value.next_step


def test_whoever_stops_watching_is_told_how_to_go_on(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = GOING
    with pytest.raises(TimedOut) as late:
        watch(RUN, JOB, memory_store, target, Reporter(), from_attempt=1, timeout_s=-1.0)
    assert f"headway logs -f --target kubernetes {RUN}" in late.value.next_step

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as left:
        watched(memory_store, target, interrupt)
    assert f"headway stop --target kubernetes {RUN}" in left.value.next_step


def test_a_store_that_fails_as_the_job_ends_is_asked_again(memory_store: MemoryStore) -> None:
    target = FakeTarget()
    target.jobs[JOB] = SUCCEEDED
    done(memory_store)
    memory_store.fail["get"] = StoreError("down")
    assert watched(memory_store, target, memory_store.fail.clear).require_outcome(RUN).state == "done"


@pytest.mark.parametrize("away", ["target", "store"])
def test_one_that_cannot_be_asked_at_first_is_asked_again(memory_store: MemoryStore, away: str) -> None:
    """Not to know of a job is not to know that there is none."""
    target = FakeTarget()
    target.jobs[JOB] = GOING
    if away == "target":
        target.fails = TargetError("no route to host")
    else:
        memory_store.fail["list"] = StoreError("down")

    def back() -> None:
        target.fails = None
        memory_store.fail.clear()

    def succeed() -> None:
        done(memory_store)
        target.jobs[JOB] = SUCCEEDED

    assert watched(memory_store, target, back, succeed).require_outcome(RUN).state == "done"


def test_why_it_waits_is_said_once(memory_store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    target = FakeTarget()
    target.jobs[JOB] = QUEUED

    def become(status: JobStatus) -> Step:
        return lambda: target.jobs.update({JOB: status})

    def nothing() -> None:
        return

    steps = [nothing] * 6 + [become(JobStatus(state=JobState.PENDING, message="no GPU"))] + [nothing] * 3
    watched(memory_store, target, *steps, become(SUCCEEDED))
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert said == ["waiting: queued", "waiting: no GPU"]


def test_why_a_job_that_runs_does_not_go_on_is_said_too(
    memory_store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    target = FakeTarget()
    target.jobs[JOB] = JobStatus(state=JobState.RUNNING, message="3 of 3 pods ready")
    lost = JobStatus(state=JobState.RUNNING, message="its head pod is lost", stands_still=True)

    def become(status: JobStatus) -> Step:
        return lambda: target.jobs.update({JOB: status})

    def nothing() -> None:
        return

    watched(memory_store, target, nothing, become(lost), *[nothing] * 6, become(SUCCEEDED))
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert said == ["waiting: its head pod is lost"]


def test_the_client_has_every_method_that_the_fake_has() -> None:
    """The fake is held to the real one's names."""
    methods = {"create", "get", "delete", "pods", "events", "workloads"}
    assert methods <= set(vars(KubernetesClient)) & set(vars(FakeClient))
