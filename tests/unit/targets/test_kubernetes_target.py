"""Attempts as RayJobs: what is sent is what was rendered, and a job is watched, read and stopped through the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from orchestrator.errors import SpecError, StoreError, TargetError
from orchestrator.package import Package
from orchestrator.record.logs import LogFile, LogWriter
from orchestrator.spec import ResourcesSpec
from orchestrator.targets.base import Capacity, JobState, JobStatus, Target
from orchestrator.targets.kubernetes.client import KubernetesClient
from orchestrator.targets.kubernetes.target import KubernetesTarget
from tests.unit.fakes import MemoryStore
from tests.unit.render.requests import attempt, settings
from tests.unit.targets.test_reasons import READY, SUSPENDED, UID, head, pending, pod, ray_job, workload

Object = dict[str, Any]
RUN, JOB = "code-lm-1a2b3c4d", "code-lm-1a2b3c4d-00002"
PACKAGE = Package(digest="ab" * 32, data=b"zip", skipped=())
RESOURCES = ResourcesSpec()


class FakeClient:
    """The Kubernetes API as far as a target asks for it. ``steps`` are called between polls, one at each sleep."""

    def __init__(self, job: Object | None = None, *, pods: list[Object] | None = None) -> None:
        self.objects: dict[str, Object] = {} if job is None else {JOB: job}
        self.its_pods = list(pods or [])
        self.queue: list[Object] = []
        self.asked: list[str] = []
        self.steps: list[Callable[[], None]] = []
        self.num_slept = 0

    def create(self, plural: str, manifest: Object) -> bool:
        name = manifest["metadata"]["name"]
        if name in self.objects:
            return False
        self.objects[name] = manifest
        return True

    def get(self, plural: str, name: str) -> Object | None:
        assert plural == "rayjobs"
        return self.objects.get(name)

    def list_all(self, plural: str) -> list[Object] | None:
        return list(self.objects.values())

    def delete(self, plural: str, name: str) -> bool:
        return self.objects.pop(name, None) is not None

    def pods(self, selector: str) -> list[Object]:
        self.asked.append(f"pods {selector}")
        return list(self.its_pods)

    def events(self, name: str) -> list[Object]:
        self.asked.append(f"events {name}")
        return []

    def workloads(self) -> list[Object]:
        self.asked.append("workloads")
        return self.queue

    def sleep(self, _seconds: float) -> None:
        self.num_slept += 1
        if self.steps:
            self.steps.pop(0)()

    def target(self, store: MemoryStore, **changes: Any) -> KubernetesTarget:
        return KubernetesTarget(
            settings(**changes), lambda: store, client=cast(KubernetesClient, self), sleep=self.sleep
        )


def say(store: MemoryStore, text: str) -> None:
    """A chunk of the driver's log arrives in the store, in a file of its own."""
    pod = f"head-{len(store.objects)}"
    LogWriter(store, RUN, LogFile(pod=pod, session="session_1", name=f"job-driver-{JOB}.log")).append(text.encode())


def test_it_is_a_target(memory_store: MemoryStore) -> None:
    target: Target[Any] = FakeClient().target(memory_store)
    assert target.restarts_jobs


# -- submitting


def test_submitting_stores_the_code_and_creates_the_very_object(memory_store: MemoryStore) -> None:
    client = FakeClient()
    target = client.target(memory_store)
    request = target.render(attempt())
    submission = target.submit(request, PACKAGE)
    assert (submission.submission_id, submission.created) == (JOB, True)
    assert client.objects == {JOB: request.body()}
    assert memory_store.objects == {f"code/{PACKAGE.digest}.zip": b"zip"}


def test_submitting_again_attaches(memory_store: MemoryStore) -> None:
    client = FakeClient()
    target = client.target(memory_store)
    request = target.render(attempt(store_uri=memory_store.uri))
    target.submit(request, PACKAGE)
    assert not target.submit(request, PACKAGE).created


def test_a_name_that_a_run_of_another_store_has_is_refused(memory_store: MemoryStore) -> None:
    """Two stores may give one id to their runs; to attach would be to watch the other's."""
    client = FakeClient()
    target = client.target(memory_store)
    theirs = target.render(attempt(store_uri="s3://theirs/prefix"))
    target.submit(theirs)
    with pytest.raises(TargetError, match=f"RayJob {JOB} in namespace headway works with s3://theirs/prefix") as caught:
        target.submit(target.render(attempt(store_uri=memory_store.uri)), PACKAGE)
    assert memory_store.uri in str(caught.value)
    assert "change the run's name" in caught.value.next_step
    assert client.objects == {JOB: theirs.body()}


def test_without_its_code_no_job_is_created(memory_store: MemoryStore) -> None:
    """The pods would look for it in vain."""
    client = FakeClient()
    memory_store.fail["upload"] = StoreError("down")
    target = client.target(memory_store)
    with pytest.raises(StoreError):
        target.submit(target.render(attempt()), PACKAGE)
    assert client.objects == {}


# -- capacity


def test_capacity_is_what_the_settings_state(memory_store: MemoryStore) -> None:
    pools = {
        "cpu": {"max_pods": 4, "size": {"cpu": "1500m", "memory": "2Gi"}},
        "a100": {"max_pods": 2, "gpus_per_pod": 8, "size": {"cpu": "64", "memory": "512Gi"}},
    }
    target = FakeClient().target(memory_store, pools=pools)
    assert target.capacity(RESOURCES) == Capacity(num_cpus=6.0, num_gpus=0, memory_bytes=8 * 2**30, gpu_kind=None)
    assert target.capacity(ResourcesSpec(gpu="any")) == Capacity(
        num_cpus=128.0, num_gpus=16, memory_bytes=1024 * 2**30, gpu_kind="A100"
    )


def test_more_than_it_can_ever_have_is_refused_before_it_waits(memory_store: MemoryStore) -> None:
    with pytest.raises(SpecError, match="max_pods is 4"):
        FakeClient().target(memory_store).capacity(ResourcesSpec.model_validate({"workers": {"max": 9}}))


# -- watching


def test_a_job_that_is_not_there(memory_store: MemoryStore) -> None:
    client = FakeClient()
    target = client.target(memory_store)
    assert target.find(JOB) is None
    assert client.asked == [f"pods headway.dev/job={JOB}"]
    assert target.find("") is None
    assert len(client.asked) == 1, "without an id there is nothing to ask for"


def test_a_job_that_was_deleted_holds_its_place_until_its_pods_are_gone(memory_store: MemoryStore) -> None:
    """They may still save."""
    client = FakeClient(pods=[head(ending=True), pod(ending=True)])
    target = client.target(memory_store)
    assert target.find(JOB) == JobStatus(
        state=JobState.STOPPED, message="it was deleted; 2 of its pods are being ended", holds=True
    )
    assert client.asked == [f"pods headway.dev/job={JOB}"]
    client.its_pods.clear()
    assert target.find(JOB) is None


def of_another_store(*status: str, **fields: Any) -> Object:
    metadata = {"name": JOB, "annotations": {"headway.dev/store": "s3://theirs"}}
    return ray_job(*status, metadata=metadata, **fields)


@pytest.mark.parametrize("job", [of_another_store("Running", "RUNNING"), of_another_store("Suspended", **SUSPENDED)])
def test_a_job_that_is_under_way_with_another_store_is_not_ours(memory_store: MemoryStore, job: Object) -> None:
    with pytest.raises(TargetError, match=f"{JOB} in namespace headway works with s3://theirs, not with s3://memory"):
        FakeClient(job, pods=READY).target(memory_store).find(JOB)


def test_one_of_another_store_that_has_ended_is_nobodys(memory_store: MemoryStore) -> None:
    """Its name is taken all the same, so that the next one is asked for."""
    status = FakeClient(of_another_store("Complete", "SUCCEEDED")).target(memory_store).find(JOB)
    assert status is not None
    assert status.over


def found(client: FakeClient, store: MemoryStore) -> JobStatus:
    status = client.target(store).find(JOB)
    assert status is not None
    return status


def test_of_a_job_that_runs_its_clusters_pods_are_asked_for(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Running", "RUNNING", metadata={"name": JOB}), pods=READY)
    status = found(client, memory_store)
    assert (status.state, status.message) == (JobState.RUNNING, "3 of 3 pods ready")
    cluster = "demo-1a2b3c4d-00001-x7k2p"
    assert client.asked == [f"pods ray.io/cluster={cluster}", f"events {JOB}", f"events {cluster}"]


def test_of_a_job_that_waits_for_its_cluster_no_pods_are_asked_for(memory_store: MemoryStore) -> None:
    client = FakeClient({"metadata": {"name": JOB, "uid": "1"}, "spec": {}})
    assert found(client, memory_store).state is JobState.PENDING
    assert client.asked == [f"events {JOB}"]


def test_of_a_job_in_the_queue_the_queue_is_asked_for(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Suspended", rayClusterName="", **SUSPENDED))
    client.queue = [workload(pending("no quota"), uid=UID)]
    assert found(client, memory_store).message == "queued in headway, place 1 of 1: no quota"


def test_of_a_job_that_has_ended_nothing_more_is_asked_for(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Complete", "SUCCEEDED", message="Job finished successfully."))
    assert found(client, memory_store).state is JobState.SUCCEEDED
    assert client.asked == []


def test_stopping_deletes(memory_store: MemoryStore) -> None:
    target = FakeClient(ray_job()).target(memory_store)
    assert target.stop(JOB)
    assert not target.stop(JOB)


# -- logs


def test_the_log_of_a_job_that_runs_is_what_is_stored(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Running", "RUNNING"), pods=READY)
    say(memory_store, "one\n")
    assert client.target(memory_store).logs(RUN, JOB) == "one\n"
    assert client.num_slept == 0


def test_the_log_of_a_job_that_has_ended_waits_for_its_pods(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Failed", "FAILED", reason="AppFailed"), pods=[head()])
    say(memory_store, "one\n")
    client.steps = [lambda: say(memory_store, "last words\n"), client.its_pods.clear]
    assert client.target(memory_store).logs(RUN, JOB) == "one\nlast words\n"
    assert client.num_slept == 2
    assert client.asked == [f"pods headway.dev/job={JOB}"] * 3


def test_pods_that_never_go_are_not_waited_for_for_ever(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Failed", "FAILED", reason="AppFailed"), pods=[head()])
    assert client.target(memory_store, keep_finished=10).logs(RUN, JOB) == ""
    assert client.num_slept == 20


def test_the_log_of_a_job_whose_object_is_gone(memory_store: MemoryStore) -> None:
    say(memory_store, "one\n")
    client = FakeClient()
    assert client.target(memory_store).logs(RUN, JOB) == "one\n"
    assert client.num_slept == 0


def test_following_yields_what_comes_and_says_why_nothing_does(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Initializing"))

    def now(job: Object | None, *said: str) -> Callable[[], None]:
        def step() -> None:
            client.objects = {} if job is None else {JOB: job}
            client.its_pods = READY if job and job["status"]["jobDeploymentStatus"] == "Running" else []
            for text in said:
                say(memory_store, text)

        return step

    running = ray_job("Running", "RUNNING")
    client.steps = [
        now(ray_job("Initializing")),  # nothing new, so nothing is said twice
        now(running, "one\n"),
        now(running),
        now(ray_job("Complete", "SUCCEEDED"), "two\n"),
    ]
    pieces = [piece for piece in client.target(memory_store).follow(RUN, JOB) if piece]
    assert pieces == [
        "[PENDING: waiting for pods (Initializing)]\n",
        "one\n",
        "[RUNNING: 3 of 3 pods ready]\n",
        "two\n",
    ]


def test_following_ends_where_the_job_is_deleted_and_its_pods_have_said_all(memory_store: MemoryStore) -> None:
    client = FakeClient(ray_job("Running", "RUNNING"), pods=READY)
    say(memory_store, "one\n")
    client.steps = [client.objects.clear, lambda: say(memory_store, "saved\n"), client.its_pods.clear]
    assert [piece for piece in client.target(memory_store).follow(RUN, JOB) if piece] == ["one\n", "saved\n"]
    assert client.num_slept == 3


# -- the head pod


def test_the_head_of_a_run_is_the_newest_that_is_not_going_away(memory_store: MemoryStore) -> None:
    heads = [head(), head(), head(ending=True)]
    for each, minute in zip(heads, (1, 2, 3), strict=True):
        each["metadata"]["creationTimestamp"] = f"2026-03-01T10:0{minute}:00Z"
    client = FakeClient(pods=heads)
    target = client.target(memory_store)
    assert target.head_pod(RUN) is heads[1]
    assert client.asked == [f"pods headway.dev/run={RUN},ray.io/node-type=head"]
    assert FakeClient().target(memory_store).head_pod(RUN) is None


def listed(name: str, run: str | None, *, second: int, store: str | None) -> Object:
    metadata: Object = {"name": name, "creationTimestamp": f"2026-03-01T10:00:0{second}Z"}
    if run is not None:
        metadata["labels"] = {"headway.dev/run": run}
    if store is not None:
        metadata["annotations"] = {"headway.dev/store": store}
    return {"metadata": metadata}


def test_runs_are_known_by_the_newest_of_their_jobs(memory_store: MemoryStore) -> None:
    client = FakeClient()
    for name, run, second in (
        ("a-00000001-00002", "a-00000001", 2),
        ("b-00000002-00001", "b-00000002", 3),
        ("a-00000001-00001", "a-00000001", 1),
    ):
        client.objects[name] = listed(name, run, second=second, store=memory_store.uri)
    assert list(client.target(memory_store).runs().items()) == [
        ("a-00000001", "a-00000001-00002"),
        ("b-00000002", "b-00000002-00001"),
    ]


def test_ray_jobs_of_others_are_no_runs_of_this_store(memory_store: MemoryStore) -> None:
    client = FakeClient()
    client.objects = {
        "other": listed("other", None, second=1, store=None),
        "a": listed("a", "a-00000001", second=2, store="s3://theirs"),
        "b": listed("b", "b-00000002", second=3, store=None),
    }
    assert client.target(memory_store).runs() == {}
