"""The account of a real run: data that stalls for a known time, workers that are killed, a pause between attempts."""

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

from orchestrator.record.events import LOST_S
from orchestrator.record.goodput import Goodput, account
from orchestrator.record.model import Event, RunRecord
from orchestrator.record.run_record import read_record
from orchestrator.store import Store, open_store
from orchestrator.store.attempts import request_stop
from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from orchestrator.targets.stack import Stack
from tests.command_line import BIN
from tests.tiny_run import TINY_LLAMA

pytestmark = pytest.mark.full
RUN_TIMEOUT_S, STOP_TIMEOUT_S = 240.0, 60.0
STEPS, EVERY, STEP_S = 50, 26, 0.5
STALLED = {8: 6.5, 20: 7.5}
"""Steps, counted from 0, for whose data rank 1 has to wait once, and for how long."""
KILLED_AFTER, STOPPED_AFTER = 46, 28
PAUSE_S = 5.0
WITHIN = 0.05

TASK = """
import time
from pathlib import Path

from torch import distributed
from workloads.tasks.causal_lm import CausalLM

HERE, STALLED = Path({here!r}), {stalled!r}


class StalledTask(CausalLM):
    stalling = False

    def collate(self, samples):
        if distributed.is_initialized():
            step = int(samples.row_rng(0).bit_generator.seed_seq.entropy[1])
            mark = HERE / f"stalled-{{step}}"
            self.stalling = step in STALLED
            if self.stalling and distributed.get_rank() == 1 and not mark.exists():
                began_s = time.monotonic()
                time.sleep(STALLED[step])
                mark.write_text(str(time.monotonic() - began_s))
        return super().collate(samples)

    def loss_sum(self, model, batch):
        for _ in range(20):
            # Data is asked for a step ahead: what the step before computes meanwhile would not be waited for.
            if distributed.is_initialized() and not self.stalling:
                time.sleep({step_s} / 20)
        return super().loss_sum(model, batch)
"""
RUN: dict[str, Any] = {
    "apiVersion": "headway/v1",
    "name": "goodput",
    "task": "stalled_task:StalledTask",
    "model": {"architecture": TINY_LLAMA},
    "data": {"train": "data/*.txt", "vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32},
    "train": {
        "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "step_timeout": 10.0,
        "optimizer": {"learning_rate": 1e-3},
    },
    "checkpoint": {"every_steps": EVERY},
    "resources": {"workers": {"min": 2, "max": 2}, "max_failures": 2},
    "gate": {"max_eval_samples": 16},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Days:
    """What was done to the run, by this machine's clock, and what became of it."""

    killed_s: float
    at_kill: RunRecord
    """The record as it was left when the workers were killed."""
    record: RunRecord
    stalled_s: dict[int, float]
    """How long each step's data was held up."""


class Runner:
    """The run's folder, and the processes that work on it."""

    def __init__(self, directory: Path, stack: Stack, environment: dict[str, str], store: Store) -> None:
        self.directory, self.stack, self.environment, self.store = directory, stack, environment, store
        self.log_path = directory.parent / "goodput.log"

    def start(self, job: str) -> subprocess.Popen[bytes]:
        what = ["--submission-id", job, "--working-dir", str(self.directory), "--", "headway", "run", "run.yaml"]
        return self._ray_job("submit", *what)

    def _ray_job(self, verb: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(BIN / "ray"), "job", verb, "--address", self.stack.dashboard_url, *arguments]
        with self.log_path.open("ab") as output:
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)

    def stop(self, job: str) -> None:
        self._ray_job("stop", job).wait(STOP_TIMEOUT_S)

    def run_id(self) -> str:
        return next((run for run in self.store.list_folders("runs/") if run.startswith("goodput-")), "")

    def record(self) -> RunRecord:
        return read_record(self.store, self.run_id(), now_s=time.time())

    def events(self, kind: str) -> list[Event]:
        return list(self.record().events_of(kind)) if self.run_id() else []

    def marked(self, *words: str) -> list[Identity]:
        return [
            each
            for each in processes.marked(self.stack.id)
            if all(word in processes.command_line(each.pid) for word in words)
        ]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        if not processes.wait_until(condition, timeout_s=RUN_TIMEOUT_S, ended=lambda: False):
            raise AssertionError(f"{what} did not come:\n{self.log_path.read_text()[-6000:]}")

    def wait_for_step(self, number: int, *, attempt: int) -> None:
        self.wait_for(
            lambda: any(each["step"] >= number and each["attempt"] == attempt for each in self.events("step")),
            f"step {number}",
        )


@pytest.fixture(scope="module")
def days(stack: Stack, stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Days]:
    directory = tmp_path_factory.mktemp("goodput")
    (directory / "data").mkdir()
    for number in range(12):
        (directory / "data" / f"{number:02d}.txt").write_text(" ".join(f"{number * 7 + n % 53:x}" for n in range(1000)))
    (directory / "stalled_task.py").write_text(TASK.format(here=str(directory), stalled=STALLED, step_s=STEP_S))
    (directory / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.store_environment().items():
            patch.setenv(name, value)
        runner = Runner(directory, stack, stack_environment, open_store())
        yield through_the_days(runner)


def through_the_days(runner: Runner) -> Days:
    children = [runner.start("goodput-1")]
    try:
        runner.wait_for_step(KILLED_AFTER, attempt=1)
        killed_s = time.time()
        for each in runner.marked("TrainWorker"):
            os.kill(each.pid, signal.SIGKILL)
        at_kill = runner.record()
        runner.wait_for(lambda: len(runner.events("training")) == 2, "the second group")
        runner.wait_for(lambda: runner.events("step")[-1]["step"] in range(STOPPED_AFTER, KILLED_AFTER), "its steps")
        request_stop(runner.store, runner.run_id(), 1, reason="a pause")
        runner.wait_for(lambda: bool(runner.events("attempt_ended")), "the end of the first attempt")
        time.sleep(PAUSE_S)  # the pause itself
        children.append(runner.start("goodput-2"))
        assert children[-1].wait(RUN_TIMEOUT_S) == 0, runner.log_path.read_text()[-6000:]
    finally:
        for job, child in zip(("goodput-1", "goodput-2"), children, strict=False):
            runner.stop(job)
            child.kill()
            child.wait()
    stalled = {int(path.name.partition("-")[2]): float(path.read_text()) for path in runner.directory.glob("stalled-*")}
    return Days(killed_s=killed_s, at_kill=at_kill, record=runner.record(), stalled_s=stalled)


@pytest.fixture(scope="module")
def found(days: Days) -> Goodput:
    goodput = account(days.record)
    for part, seconds in goodput.seconds.items():
        print(f"{part}: {seconds:.2f} s")
    print(f"goodput {goodput.goodput:.3f}, {goodput.restarts}, stalled {days.stalled_s}")
    return goodput


def first_group(record: RunRecord) -> dict[int, float]:
    """When each of its steps was done, as far as the store knows."""
    started = [each["time_s"] for each in record.events_of("training")]
    until_s = [*started[1:], float("inf")][0]
    return {each["step"]: each["time_s"] for each in record.events_of("step") if each["time_s"] < until_s}


def test_the_parts_add_up_to_the_wall_time(days: Days, found: Goodput) -> None:
    assert days.record.outcome is not None
    wall_s = days.record.outcome["ended_s"] - days.record.attempts[0].claimed_s
    assert sum(found.seconds.values()) == pytest.approx(wall_s, rel=0.01)
    assert sum(each.seconds for each in found.segments) == pytest.approx(wall_s, rel=0.01)


def test_the_pause_between_two_attempts_was_idle(days: Days, found: Goodput) -> None:
    first, second = days.record.attempts
    assert first.ended_s is not None
    assert found.seconds["idle"] == pytest.approx(second.claimed_s - first.ended_s, rel=WITHIN)
    assert found.seconds["idle"] >= PAUSE_S


def test_killed_workers_cost_the_time_since_the_checkpoint_and_that_of_the_restart(days: Days, found: Goodput) -> None:
    _, resumed, _ = days.record.events_of("training")
    done_s = first_group(days.record)
    restart, again = found.restarts
    assert resumed["first_step"] == EVERY
    assert restart.lost_s == pytest.approx(days.killed_s - done_s[EVERY], rel=WITHIN)
    assert restart.lost_s == pytest.approx(found.seconds["lost to rollback"])
    assert restart.lost_steps >= max(done_s) - EVERY
    assert "fell silent" in restart.reason
    restarting = [each for each in found.segments if each.part == "resuming" and each.attempt == 1]
    assert restarting[-1].seconds == pytest.approx(resumed["time_s"] - days.killed_s, rel=WITHIN)
    assert (again.attempt, again.lost_steps, again.lost_s) == (2, 0, 0.0)
    assert "a pause" in again.reason


def test_each_stall_of_the_data_is_found(days: Days, found: Goodput) -> None:
    assert set(days.stalled_s) == set(STALLED)
    waits = {each["step"]: each["data_wait_s"] for each in days.record.events_of("step") if each["data_wait_s"] > 1.0}
    assert waits == pytest.approx(days.stalled_s, rel=WITHIN)
    assert found.seconds["waiting for data"] == pytest.approx(sum(days.stalled_s.values()), rel=WITHIN)


def test_computing_is_what_the_steps_took(found: Goodput) -> None:
    slept_s = (STEPS - len(STALLED)) * STEP_S
    assert slept_s <= found.seconds["computing"] <= 1.8 * slept_s  # the tiny model computes besides


def test_the_record_of_what_was_killed_is_complete_up_to_the_last_seconds(days: Days) -> None:
    done_s = first_group(days.at_kill)
    assert days.killed_s - max(done_s.values()) <= LOST_S
    assert set(done_s) == set(range(1, max(done_s) + 1))
