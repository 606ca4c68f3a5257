"""Attempts as RayJobs on a Kubernetes cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from orchestrator.errors import TargetError
from orchestrator.package import Package
from orchestrator.record.logs import LogReader
from orchestrator.render import RayJobRequest, RequestedJob, ray_job
from orchestrator.render.pods import JOB_LABEL, RUN_LABEL, STORE
from orchestrator.render.ray_job import num_pods
from orchestrator.spec import ResourcesSpec
from orchestrator.store import Store
from orchestrator.store.code import upload_code
from orchestrator.target_settings import TargetSettings, amount
from orchestrator.targets.base import Capacity, JobState, JobStatus, Submission
from orchestrator.targets.kubernetes.client import RAY_JOBS, KubernetesClient, Object
from orchestrator.targets.kubernetes.reasons import job_status

_POLL_S = 2.0
_LAST_WORDS_S = 30.0


class KubernetesTarget:
    """One namespace, by the settings of ``target.yaml``.

    Args:
        store: where the working directory goes and the logs come from; the same one that pods use.
    """

    restarts_jobs = True

    def __init__(
        self,
        settings: TargetSettings,
        store: Callable[[], Store],
        *,
        client: KubernetesClient,
        flag: str = " --target kubernetes",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.client, self.flag = settings, client, flag
        self._store, self._sleep = store, sleep

    def capacity(self, resources: ResourcesSpec) -> Capacity:
        return stated_capacity(self.settings, resources)

    def render(self, job: RequestedJob) -> RayJobRequest:
        return ray_job(job, self.settings)

    def submit(self, request: RayJobRequest, package: Package | None = None) -> Submission:
        """Put the working directory into the store, then create the RayJob. Submitting an id twice is safe."""
        if package is not None:
            upload_code(self._store(), digest=package.digest, data=package.data)
        created = self.client.create(RAY_JOBS, request.body())
        if not created:
            self.find(request.submission_id)  # which tells whose it is
        return Submission(submission_id=request.submission_id, created=created)

    def find(self, submission_id: str) -> JobStatus | None:
        """Like every target's. A RayJob that was deleted holds its place until its pods are gone: they may still save.

        Raises:
            TargetError: it is under way with another store.
        """
        job = self.client.get(RAY_JOBS, submission_id) if submission_id else None
        if job is None:
            left = self.client.pods(f"{JOB_LABEL}={submission_id}") if submission_id else []
            gone = f"it was deleted; {len(left)} of its pods are being ended"
            return JobStatus(state=JobState.STOPPED, message=gone, holds=True) if left else None
        found = self._status(job)
        if not found.over:
            self._require_own(job)
        return found

    def _status(self, job: Object) -> JobStatus:
        without_pods = job_status(job)
        if without_pods.state.ended:
            return without_pods
        name, cluster = job["metadata"]["name"], (job.get("status") or {}).get("rayClusterName", "")
        return job_status(
            job,
            pods=self.client.pods(f"ray.io/cluster={cluster}") if cluster else [],
            workloads=self.client.workloads() if job["spec"].get("suspend") else [],
            events=[*self.client.events(name), *(self.client.events(cluster) if cluster else [])],
        )

    def _require_own(self, job: Object) -> None:
        theirs, ours = (job["metadata"].get("annotations") or {}).get(STORE), self._store().uri
        if theirs not in (None, ours):
            raise TargetError(
                f"RayJob {job['metadata']['name']} in namespace {self.settings.namespace} works with {theirs}, "
                f"not with {ours}.",
                next_step="Use that store, or change the run's name.",
            )

    def runs(self) -> dict[str, str]:
        jobs = [job["metadata"] for job in self.client.list_all(RAY_JOBS) or []]
        store = self._store().uri
        ours = [
            each
            for each in jobs
            if RUN_LABEL in (each.get("labels") or {}) and (each.get("annotations") or {}).get(STORE) == store
        ]
        ours.sort(key=lambda each: str(each["creationTimestamp"]))
        return {each["labels"][RUN_LABEL]: str(each["name"]) for each in ours}

    def logs(self, run_id: str, submission_id: str) -> str:
        """The driver's log as it is in the store: some seconds behind while it runs, and whole when it has ended."""
        status = self.find(submission_id)
        if status is not None and status.state.ended:
            self._wait_for_last_words(submission_id)
        log = LogReader(self._store(), run_id).follow(submission_id)
        return "".join([*log.poll(), *log.finish()])

    def follow(self, run_id: str, submission_id: str) -> Iterator[str]:
        log = LogReader(self._store(), run_id).follow(submission_id)
        told = ""
        while True:
            status = self.find(submission_id)
            pieces = list(log.poll())
            yield from pieces
            if status is None or status.state.ended:
                break
            if not pieces and status.message != told:
                told = status.message
                yield f"[{status.state}: {told}]\n"
            self._sleep(_POLL_S)
        self._wait_for_last_words(submission_id)
        yield from log.finish()

    def stop(self, submission_id: str) -> bool:
        """Delete the RayJob. KubeRay stops its job first, which saves and ends within the pods' grace."""
        return self.client.delete(RAY_JOBS, submission_id)

    def head_pod(self, run_id: str) -> Object | None:
        """The head pod of a run that is under way."""
        heads = self.client.pods(f"{RUN_LABEL}={run_id},ray.io/node-type=head")
        alive = [pod for pod in heads if not pod["metadata"].get("deletionTimestamp")]
        return max(alive, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)

    def _wait_for_last_words(self, submission_id: str) -> None:
        """Wait until the pods of a job that has ended are gone: what they still had to say is in the store then."""
        for _ in range(int((self.settings.keep_finished + _LAST_WORDS_S) / _POLL_S)):
            if not self.client.pods(f"{JOB_LABEL}={submission_id}"):
                return
            self._sleep(_POLL_S)


def stated_capacity(settings: TargetSettings, resources: ResourcesSpec) -> Capacity:
    """What ``target.yaml`` has for a run that asks for these. Pure: no cluster is asked.

    Raises:
        SpecError: it has no such pool, or too little of it.
    """
    name, pool = settings.pool_of(resources.gpu)
    num_pods(resources, name, pool)
    return Capacity(
        num_cpus=pool.max_pods * amount(pool.size.cpu),
        num_gpus=pool.max_pods * pool.gpus_per_pod,
        memory_bytes=int(pool.max_pods * amount(pool.size.memory)),
        gpu_kind=name.upper() if pool.gpus_per_pod else None,
    )
