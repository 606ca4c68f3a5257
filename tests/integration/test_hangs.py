"""Ranks that hang, on one embedded stack: noticed in time, named, and their group restarted.

The tests go in order, over one run that goes through both. What became of it is asked of the store.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.record import EventReader
from orchestrator.store import Store, open_store
from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from orchestrator.targets.stack import Stack
from tests.command_line import BIN
from tests.tiny_run import TINY_LLAMA

pytestmark = pytest.mark.full

JOB = "hanging"
RUN_TIMEOUT_S, STOP_TIMEOUT_S = 240.0, 60.0
STEP_TIMEOUT_S = 10.0
RESTART_S = 120.0
"""The longest from the notice to the next group's first step."""
MARK_S = 0.5
"""The longest from entering a phase to the mark that a rank leaves there."""
STEPS, STUCK_STEP, EVERY = 80, 8, 4
NUM_FILES, FILE_BYTES = 12, 3000

TASK = f"""
import threading
import time
from pathlib import Path

from torch import distributed
from workloads.tasks.causal_lm import CausalLM

HERE = Path({{here!r}})


class HangingTask(CausalLM):
    num_steps = 0

    def loss_sum(self, model, batch):
        self.num_steps += 1
        if distributed.is_initialized() and not (HERE / "fast").exists():
            if self.num_steps == {STUCK_STEP} and distributed.get_rank() == 1 and not (HERE / "stuck").exists():
                (HERE / "stuck").touch()
                self.wait_for_what_never_comes()
            time.sleep(0.25)
        return super().loss_sum(model, batch)

    def wait_for_what_never_comes(self):
        threading.Event().wait()
"""
RUN = {
    "apiVersion": "headway/v1",
    "name": "hanging",
    "task": "hanging_task:HangingTask",
    "model": {"architecture": TINY_LLAMA},
    "data": {"train": "data/*.txt", "vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32},
    "train": {
        "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "step_timeout": STEP_TIMEOUT_S,
        "optimizer": {"learning_rate": 1e-3},
    },
    "checkpoint": {"every_steps": EVERY},
    "resources": {"workers": {"min": 2, "max": 2}, "max_failures": 2},
    "gate": {"max_eval_samples": 16},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on its way on a stack."""

    directory: Path
    """Submitted as the working directory."""
    stack: Stack
    store: Store
    child: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        runs = [run for run in self.store.list_folders("runs/") if run.startswith("hanging-")]
        return [event for run in runs for event in EventReader(self.store, run).poll() if event["kind"] == kind]

    def workers(self) -> list[Identity]:
        """The processes of Ray Train's workers."""
        marked = processes.marked(self.stack.id)
        return [each for each in marked if "TrainWorker" in processes.command_line(each.pid)]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what happens while the run lasts."""

        def has_ended() -> bool:
            return self.child.poll() is not None

        if not processes.wait_until(condition, timeout_s=RUN_TIMEOUT_S, ended=has_ended):
            raise AssertionError(f"{what} did not come:\n{self.log[-6000:]}")

    def wait_for_group(self, number: int) -> dict[str, Any]:
        """Wait until that group of workers, counted from 1, has done a step.

        Returns its ``training`` event, and with it when that step was done.
        """

        def steps() -> list[dict[str, Any]]:
            started = self.events("training")
            return [event for event in self.events("step") if event["time_s"] > started[-1]["time_s"]]

        self.wait_for(lambda: len(self.events("training")) == number and bool(steps()), f"group {number}")
        return {**self.events("training")[-1], "first_done_s": steps()[0]["time_s"]}


@pytest.fixture(scope="module")
def run(stack: Stack, stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("hangs")
    (directory / "data").mkdir()
    for number in range(NUM_FILES):
        words = " ".join(f"{number * 7 + each % 53:x}" for each in range(FILE_BYTES // 3))
        (directory / "data" / f"{number:02d}.txt").write_text(words)
    (directory / "hanging_task.py").write_text(TASK.format(here=str(directory)))
    (directory / "run.yaml").write_text(yaml.safe_dump(RUN))
    log = directory.parent / "hangs.log"
    ray_job, where = [str(BIN / "ray"), "job"], ["--address", stack.dashboard_url]
    what = ["--submission-id", JOB, "--working-dir", str(directory), "--", "headway", "run", "run.yaml"]
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        for name, value in stack.store_environment().items():
            patch.setenv(name, value)
        child = subprocess.Popen(
            [*ray_job, "submit", *where, *what],
            env=stack_environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Run(directory=directory, stack=stack, store=open_store(), child=child, log_path=log)
        finally:
            stop = [*ray_job, "stop", *where, JOB]  # says no more where the job has ended, as it should have
            subprocess.run(
                stop, env=stack_environment, stdout=output, stderr=output, timeout=STOP_TIMEOUT_S, check=False
            )
            child.kill()
            child.wait()


def print_times(what: str, hang: dict[str, Any], group: dict[str, Any], *, since_s: float) -> None:
    noticed_s, step_s = hang["time_s"] - since_s, group["first_done_s"] - since_s
    print(f"{what}: noticed after {noticed_s:.1f} s, the next group's first step done after {step_s:.1f} s")


def lost_steps(run: Run, hang: dict[str, Any], group: dict[str, Any]) -> int:
    done = [event["step"] for event in run.events("step") if event["time_s"] < hang["time_s"]]
    return int(done[-1] - group["first_step"])


def test_a_stuck_rank_is_named_shows_where_and_its_group_is_restarted(run: Run) -> None:
    group = run.wait_for_group(2)
    stuck_s = (run.directory / "stuck").stat().st_mtime
    (hang,) = run.events("hang")
    print(
        f"stuck: noticed after {hang['time_s'] - stuck_s:.1f} s, next step after {group['first_done_s'] - stuck_s:.1f}"
    )

    assert STEP_TIMEOUT_S - MARK_S <= hang["time_s"] - stuck_s <= 2 * STEP_TIMEOUT_S
    assert group["first_done_s"] - hang["time_s"] <= RESTART_S
    assert (hang["ranks"], hang["reason"], hang["step"], hang["phase"]) == ([1], "stuck", STUCK_STEP, "forward")
    assert lost_steps(run, hang, group) <= EVERY
    assert "hang: no progress of rank 1 (pid " in run.log
    assert "Rank found stuck; the stacks of process" in run.log
    assert "in wait_for_what_never_comes" in run.log


def test_a_frozen_rank_is_named_and_killed_and_its_group_restarted(run: Run) -> None:
    victim = run.workers()[-1]
    stopped_s = time.time()
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        run.wait_for(lambda: not processes.alive(victim), "the end of the frozen process")
        print(f"frozen: the process was gone after {time.time() - stopped_s:.1f} s")
    finally:
        if processes.alive(victim):
            os.kill(victim.pid, signal.SIGKILL)
    group = run.wait_for_group(3)
    _, hang = run.events("hang")
    print_times("frozen", hang, group, since_s=stopped_s)

    assert hang["time_s"] - stopped_s <= STEP_TIMEOUT_S
    assert group["first_done_s"] - hang["time_s"] <= RESTART_S
    assert hang["reason"] == "silent"
    assert lost_steps(run, hang, group) <= EVERY
    (rank,) = hang["ranks"]
    assert f"hang: no sign of life from rank {rank} (pid {victim.pid} on node " in run.log


def test_a_run_that_hung_twice_ends_done_and_leaves_no_process(run: Run) -> None:
    (run.directory / "fast").touch()
    assert run.child.wait(RUN_TIMEOUT_S) == 0, run.log[-6000:]
    assert [event["state"] for event in run.events("outcome")] == ["done"]
    assert {event["attempt"] for event in run.events("training")} == {1}
    assert len(run.events("hang")) == 2
    assert processes.wait_until(lambda: run.workers() == [], timeout_s=30.0, ended=lambda: False)
    assert not [each for each in processes.marked(run.stack.id) if "Watchdog" in processes.command_line(each.pid)]
