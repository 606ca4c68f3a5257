"""From ``headway submit --target kubernetes`` to the first optimizer step, beside a bare RayJob with the same pods.

The bare RayJob's pods have the image, sizes, labels, queue, token and mounts of Headway's, without its containers
beside Ray; it runs bare_rayjob.py, whose batches lie ready in memory. They take turns on the cluster, each on an idle
one: Headway on a dataset that is prepared, the bare one, and Headway on text that it has to prepare first.

    make bench NAME=submit
    python -m tests.bench.submit --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from orchestrator import __version__
from orchestrator.commands.demo import RUN_FILE, upload_corpus
from orchestrator.dataset.format import DatasetManifest, find_dataset
from orchestrator.plan import split_batch
from orchestrator.render import AttemptRequest, ray_job
from orchestrator.render.pods import RUN_LABEL
from orchestrator.reporter import Reporter
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Store
from orchestrator.target_settings import TargetSettings, load_settings
from orchestrator.targets.kubernetes.client import RAY_JOBS, KubernetesClient
from tests.bench.harness import at_most, finish, say, spread
from tests.cluster.installed import Installed, install
from tests.cluster.layout import NAMESPACE
from tests.cluster.runs import open_store_with, submit
from workloads.deepspeed_config import deepspeed_config
from workloads.tasks import task_of

MAX_RATIO = 1.1
STEPS = 3
DEADLINE_S = 400.0
SCRIPT = Path(__file__).with_name("bare_rayjob.py")
_POLL_S = 2.0
_MOUNT = "/bare"
_KEEP_PODS_S = 120  # after the end: they are read, then deleted
_CONTAINER_FIELDS = frozenset(
    {"name", "image", "imagePullPolicy", "env", "envFrom", "resources", "ports", "securityContext", "volumeMounts"}
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One submission: seconds from its command to the points on the way, in their order.

    Kubernetes tells whole seconds, so ``created`` to ``job`` may be up to one too small.
    """

    seconds: dict[str, float]

    @property
    def first_step_s(self) -> float:
        return self.seconds["step"]


POINTS = {
    "created": "the RayJob exists",
    "placed": "its last pod has a node",
    "head": "Ray starts in its head",
    "ray": "Ray starts in its last pod",
    "ready": "its last pod is ready",
    "job": "KubeRay has submitted the job",
    "fit": "the driver starts the group of workers",
    "training": "the workers have their engine and data",
    "step": "the first optimizer step is done",
}


@dataclass(kw_only=True)
class Bench:
    """The contenders, on one cluster with a store of their own."""

    cluster: Installed
    client: KubernetesClient
    prefix: str
    directory: Path
    store: Store = field(init=False)
    settings: TargetSettings = field(init=False)
    source: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        self.store = open_store_with(self.cluster.settings(self.prefix))
        self.cluster.write_target(self.directory, keep_finished=_KEEP_PODS_S)
        self.settings = load_settings(self.directory / "target.yaml")
        self.source = upload_corpus(self.store, Reporter())

    def spec_document(self, name: str, data: dict[str, Any]) -> dict[str, Any]:
        """The demo's model and batch for a few steps, without a release."""
        document = yaml.safe_load(RUN_FILE.replace("SOURCE", self.source))
        document["name"] = name
        document["data"] = {"sequence_length": document["data"]["sequence_length"], **data}
        document["train"] |= {"steps": STEPS, "precision": "fp32"}
        document["train"]["optimizer"]["warmup_steps"] = 0
        document["checkpoint"]["every_steps"] = STEPS
        del document["release"], document["gate"]
        return dict(document)

    def from_text(self, number: int) -> Start:
        """Of a name that no dataset has, so that all of the text is prepared anew."""
        text = {"train": self.source, "format": "text", "vocab_size": 2048}
        return self._headway(self.spec_document(f"text-{number}", text))

    def prepared(self, number: int) -> Start:
        return self._headway(self.spec_document(f"prepared-{number}", {"dataset": self.dataset}))

    def _headway(self, document: dict[str, Any]) -> Start:
        (self.directory / "run.yaml").write_text(yaml.safe_dump(document))
        begun_s = time.time()
        with submit(self.cluster, self.directory, self.prefix, name=document["name"]) as run:
            run.finish().assert_done()
            train = [event for event in run.events("stage_started") if event["stage"] == "train"]
            times_s = {
                **self._pod_times_s(run.run_id),
                "fit": train[0]["time_s"],
                "training": run.events("training")[0]["time_s"],
                "step": next(event["time_s"] for event in run.events("step") if event["step"] == 1),
            }
        return _start(begun_s, times_s)

    def bare(self, number: int) -> Start:
        spec = parse(self.spec_document("bare", {"dataset": self.dataset}))
        name = f"bare-{secrets.token_hex(4)}"
        config = bare_config(spec, find_dataset(self.store, self.dataset))
        manifest = bare_ray_job(spec, name, self.settings, store_uri=self.store.uri, config=config)
        self.cluster.apply(script_map(name))
        sent, job = json.dumps(manifest), manifest["metadata"]["name"]
        begun_s = time.time()
        self.cluster.kubectl("create", "-f", "-", stdin=sent)
        self._wait(lambda: self._succeeded(job), f"the end of {job}")
        (head,) = self.cluster.objects("pods", f"{RUN_LABEL}={name},ray.io/node-type=head")
        log = f"/tmp/ray/session_latest/logs/job-driver-{job}.log"
        said = self.cluster.kubectl("-n", NAMESPACE, "exec", head["metadata"]["name"], "-c", "ray", "--", "cat", log)
        # Ray puts the name of the process before a worker's line.
        printed = [json.loads(line[line.index("{") :]) for line in said.splitlines() if '{"times_s"' in line]
        times_s = {point: at_s for each in printed for point, at_s in each["times_s"].items()}
        return _start(begun_s, {**self._pod_times_s(name), **times_s})

    def _succeeded(self, job: str) -> bool:
        status = (self.client.get(RAY_JOBS, job) or {}).get("status", {})
        assert status.get("jobStatus") not in ("FAILED", "STOPPED"), status
        return bool(status.get("jobStatus") == "SUCCEEDED")

    def _pod_times_s(self, run: str) -> dict[str, float]:
        """What Kubernetes and KubeRay say of a run whose pods are still there."""
        (job,) = self.cluster.objects("rayjobs", f"{RUN_LABEL}={run}")
        pods = self.cluster.objects("pods", f"{RUN_LABEL}={run}")
        conditions = [{each["type"]: each for each in pod["status"]["conditions"]} for pod in pods]
        started = {
            pod["metadata"]["labels"]["ray.io/node-type"]: _time_s(status["state"]["running"]["startedAt"])
            for pod in pods
            for status in pod["status"]["containerStatuses"]
            if status["name"] == "ray"
        }
        return {
            "created": _time_s(job["metadata"]["creationTimestamp"]),
            "placed": max(_time_s(each["PodScheduled"]["lastTransitionTime"]) for each in conditions),
            "head": started["head"],
            "ray": max(started.values()),
            "ready": max(_time_s(each["Ready"]["lastTransitionTime"]) for each in conditions),
            "job": _time_s(job["status"]["rayJobInfo"]["startTime"]),
        }

    def wait_until_idle(self) -> None:
        """Until no pod of Ray's is in the namespace: there are no more GPUs than one run asks for."""
        self._wait(lambda: not self.client.pods("ray.io/cluster"), "an idle cluster")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Look about as often as ``headway submit`` looks at its RayJob: both contenders share their CPUs with this."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come within {DEADLINE_S:.0f} s")
            time.sleep(_POLL_S)

    def clean_up(self) -> None:
        """Delete what this benchmark has sent, whatever came of it."""
        mine = [
            job["metadata"]["name"]
            for job in self.cluster.objects("rayjobs", RUN_LABEL)
            if job["metadata"]["annotations"].get("headway.dev/store") == self.store.uri
        ]
        if mine:
            self.cluster.kubectl("-n", NAMESPACE, "delete", "rayjob", *mine, "--wait=false")
        self.cluster.kubectl("-n", NAMESPACE, "delete", "configmap", "-l", "headway.dev/bench=submit")


def bare_ray_job(
    spec: RunSpec, name: str, settings: TargetSettings, *, store_uri: str, config: dict[str, Any]
) -> dict[str, Any]:
    """Headway's RayJob without what Headway adds: its containers beside Ray, its hooks and its retries."""
    attempt = AttemptRequest(
        run_id=name, attempt=1, run_file="run.yaml", version=__version__, package_digest=None, store_uri=store_uri,
        resources=spec.resources,
    )  # fmt: skip
    manifest = ray_job(attempt, settings).body()
    manifest["spec"] |= {
        "entrypoint": shlex.join(["python", f"{_MOUNT}/{SCRIPT.name}", json.dumps(config)]),
        "backoffLimit": 0,
    }
    cluster = manifest["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    for group in (head, *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod.pop("initContainers", None)
        (ray,) = pod["containers"]
        pod["containers"] = [{key: value for key, value in ray.items() if key in _CONTAINER_FIELDS}]
    pod = head["template"]["spec"]
    pod["volumes"].append({"name": "script", "configMap": {"name": name}})
    pod["containers"][0]["volumeMounts"].append({"name": "script", "mountPath": _MOUNT})
    return dict(manifest)


def bare_config(spec: RunSpec, dataset: DatasetManifest) -> dict[str, Any]:
    """The same model, batch and DeepSpeed config as the run's."""
    task = task_of(spec, dataset)
    num_workers = spec.resources.workers.max
    split = split_batch(spec.train.global_batch_size, num_workers, spec.train.micro_batch_size)
    assert split.accumulation == 1, "the bare loop makes one optimizer step of each batch"
    num_trainable = sum(parameter.numel() for parameter in task.build_model().parameters())
    return {
        "architecture": {**spec.model.architecture, "vocab_size": dataset.tokenizer.vocab_size},
        "rows": split.micro_rows,
        "sequence_length": spec.data.sequence_length,
        "num_workers": num_workers,
        "deepspeed": deepspeed_config(
            spec.train, split, precision="fp32", device=torch.device("cpu"), num_trainable=num_trainable
        ),
    }


def script_map(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"headway.dev/bench": "submit"}},
        "data": {SCRIPT.name: SCRIPT.read_text()},
    }


def _start(begun_s: float, times_s: dict[str, float]) -> Start:
    return Start(seconds={point: round(times_s[point] - begun_s, 2) for point in POINTS})


def _time_s(text: str) -> float:
    """Kubernetes' time, which has whole seconds."""
    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.submit")
    parser.add_argument("--rounds", type=int, default=3, help="submissions of each contender")
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        cluster = install()
        os.environ["KUBECONFIG"] = cluster.kubeconfig
        bench = Bench(
            cluster=cluster,
            client=KubernetesClient(NAMESPACE),
            prefix=f"bench/{secrets.token_hex(4)}",
            directory=Path(folder),
        )
        try:
            starts = measure(bench, num_rounds=asked.rounds)
        finally:
            bench.clean_up()
    report(starts)


def measure(bench: Bench, *, num_rounds: int) -> dict[str, list[Start]]:
    """Turn by turn, each round in the other order, after one start that does not count: it prepares the dataset."""
    contenders = {"headway": bench.prepared, "bare": bench.bare, "headway from text": bench.from_text}
    starts: dict[str, list[Start]] = {name: [] for name in contenders}

    def take(name: str, number: int) -> Start:
        bench.wait_until_idle()
        try:
            start = contenders[name](number)
        finally:
            bench.clean_up()
        say(f"{name:<18} {start.first_step_s:5.1f} s  {start.seconds}")
        return start

    take("headway from text", 0)
    bench.dataset = "text-0"
    for number in range(1, num_rounds + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            starts[name].append(take(name, number))
    return starts


def report(starts: dict[str, list[Start]]) -> None:
    figures: dict[str, Any] = {}
    for name, found in starts.items():
        figures[name] = {
            "first_step_s": spread([each.first_step_s for each in found]),
            "points_s": {point: statistics.median(each.seconds[point] for each in found) for point in POINTS},
        }
    ratio = figures["headway"]["first_step_s"]["median"] / figures["bare"]["first_step_s"]["median"]
    finish("submit", figures, {"first step over bare's": at_most(ratio, MAX_RATIO)})


if __name__ == "__main__":
    main()
