"""Runs on the test cluster: what the store and the cluster say of them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.record import EventReader
from orchestrator.store import Store
from orchestrator.store.s3 import PATIENT, new_client
from orchestrator.targets import processes
from tests.cluster.installed import Installed
from tests.command_line import Said, start

STEPS = 150
RUN_TIMEOUT_S = 420.0


def open_store_with(settings: dict[str, str]) -> Store:
    """The store that a command with these variables would open, without changing this process's own."""
    bucket, _, prefix = settings["HEADWAY_STORE"].removeprefix("s3://").partition("/")
    return Store(bucket, prefix, client=new_client(PATIENT, settings))


@dataclass(kw_only=True)
class Submitted:
    """A ``headway submit`` that watches its run."""

    cluster: Installed
    store: Store
    name: str
    child: subprocess.Popen[str]
    out_path: Path
    err_path: Path

    @property
    def run_id(self) -> str:
        return next(run for run in self.store.list_folders("runs/") if run.startswith(f"{self.name}-"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        runs = [run for run in self.store.list_folders("runs/") if run.startswith(f"{self.name}-")]
        return [event for run in runs for event in EventReader(self.store, run).poll() if event["kind"] == kind]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        ended = lambda: self.child.poll() is not None  # noqa: E731
        if not processes.wait_until(condition, timeout_s=RUN_TIMEOUT_S, ended=ended):
            raise AssertionError(f"{what} did not come:\n{self.out_path.read_text()}\n{self.err}")

    def wait_for_step(self, step: int, *, group: int) -> None:
        """Until that group of workers, counted from 1 over all attempts, or a later one has done this step."""

        def reached() -> bool:
            groups = self.events("training")
            if len(groups) < group:
                return False
            since_s = groups[-1]["time_s"]
            return any(each["step"] >= step and each["time_s"] > since_s for each in self.events("step"))

        self.wait_for(reached, f"step {step} of group {group}")

    @property
    def err(self) -> str:
        """What it has said so far."""
        return self.err_path.read_text()

    def wait_for_line(self, *words: str) -> str:
        """The first line that it says with all of these words."""

        def found() -> list[str]:
            return [line for line in self.err.splitlines() if all(word in line for word in words)]

        self.wait_for(lambda: bool(found()), f"a line with {words}")
        return found()[0]

    def finish(self) -> Said:
        try:
            code = self.child.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} was not done after {RUN_TIMEOUT_S:.0f} s:\n{self.err}") from None
        return Said(arguments=("submit", self.name), code=code, out=self.out_path.read_text(), err=self.err)

    def losses(self) -> dict[int, float]:
        """By step; where a step was done again, the last one that counts."""
        return losses_of(self.events("step"))

    def pods(self, node_type: str) -> list[dict[str, Any]]:
        selector = f"headway.dev/run={self.run_id},ray.io/node-type={node_type}"
        found = self.cluster.objects("pods", selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def wait_until_gone(self) -> None:
        """Until its pods are, which is when its RayJob has ended too."""
        gone = lambda: self.cluster.objects("pods", f"headway.dev/run={self.run_id}") == []  # noqa: E731
        assert processes.wait_until(gone, timeout_s=RUN_TIMEOUT_S, ended=lambda: False), "its pods are left"

    def ray_jobs(self) -> list[dict[str, Any]]:
        """Of this run in this store; another test may have run the same in a store of its own."""
        found = self.cluster.objects("rayjobs", f"headway.dev/run={self.run_id}")
        return [job for job in found if job["metadata"]["annotations"]["headway.dev/store"] == self.store.uri]


def losses_of(steps: list[dict[str, Any]]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in steps}


@contextmanager
def submit(
    cluster: Installed, directory: Path, prefix: str, *arguments: str, name: str = "code-lm"
) -> Iterator[Submitted]:
    """A submission that goes on until it has ended or is no longer needed."""
    settings = cluster.settings(prefix)
    where = Path(tempfile.mkdtemp(dir=directory.parent))  # beside the working directory, which is what is submitted
    out_path, err_path = where / "out", where / "err"
    command = ("submit", "run.yaml", "--target", "kubernetes", *arguments)
    with out_path.open("w") as out, err_path.open("w") as err:
        child = start(*command, directory=directory, settings=settings, out=out, err=err)
    try:
        yield Submitted(
            cluster=cluster,
            store=open_store_with(settings),
            name=name,
            child=child,
            out_path=out_path,
            err_path=err_path,
        )
    finally:
        child.kill()
        child.wait()
