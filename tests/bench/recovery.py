"""From the SIGKILL of a worker to the next new step: Headway's training against plain Ray Train and DeepSpeed.

Both train the same model on the same data with the same engine, on the same local Ray cluster, and save as often to
the same S3 server: Headway its own checkpoints, the plain loop DeepSpeed's, through ``ray.train.report``. They take
turns, a few kills a turn, each of a random rank at a random point between two checkpoints. A new step is one that was
not done before the kill, and it counts when it is done.

    make bench NAME=recovery
    python -m tests.bench.recovery --kills 2
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.commands.demo import RUN_FILE, upload_corpus
from orchestrator.commands.stack import options
from orchestrator.reporter import Reporter
from orchestrator.runs import identify
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Store, claim_attempt, open_store
from orchestrator.store.attempts import request_stop
from orchestrator.targets import local
from tests.bench.harness import at_most, finish, say, spread
from tests.bench.recovery_plain import train_plain
from tests.bench.recovery_trace import FOLDER_VARIABLE, Begun, read_traces

EVERY_STEPS = 40
KILLS_A_TURN = 2
MAX_RATIO = 1.05
DEADLINE_S = 180.0
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One kill and what it cost."""

    seconds: float
    """To the end of the first new step."""
    lost_steps: int
    """Steps that were done, and had to be done again."""
    first_step_s: float
    """To the beginning of the first step of any kind."""


@dataclass
class Killer:
    """Kills workers of the group that trains, and watches it come back. Runs beside Ray Train's ``fit``."""

    folder: Path
    random: random.Random
    known: frozenset[Begun]
    recoveries: list[Recovery] = field(default_factory=list)
    error: Exception | None = None

    def run(self, num_kills: int, stop: Callable[[], None]) -> None:
        try:
            for _ in range(num_kills):
                self.recoveries.append(self._kill_once())
                say(f"  {self.recoveries[-1]}")
        except Exception as e:  # told where fit returns
            self.error = e
        finally:
            stop()

    def _kill_once(self) -> Recovery:
        begun = self._wait(lambda seen: seen, "the first step")
        saved = (begun[-1].step // EVERY_STEPS + 1) * EVERY_STEPS
        target = saved + self.random.randrange(EVERY_STEPS)
        before = self._wait(lambda seen: [each for each in seen if each.step >= target], f"step {target}")
        time.sleep(self.random.random() * _step_s(self._seen()))  # the point within the step is random too
        victim = self.random.choice([each for each in before if each.step == target])
        os.kill(victim.pid, signal.SIGKILL)
        killed_s = time.time()
        last = max(each.step for each in self._seen() if each.time_s <= killed_s)
        pids = {each.pid for each in before}
        # The step that was under way is the first new one; it is done where the one after it begins.
        new = self._wait(lambda seen: [each for each in seen if each.pid not in pids and each.step > last], "recovery")
        resumed = [each for each in self._seen() if each.pid not in pids and each.time_s > killed_s]
        return Recovery(
            seconds=new[0].time_s - killed_s,
            lost_steps=last - resumed[0].step,
            first_step_s=resumed[0].time_s - killed_s,
        )

    def _seen(self) -> list[Begun]:
        return [each for each in read_traces(self.folder) if each not in self.known]

    def _wait(self, found: Callable[[list[Begun]], list[Begun]], what: str) -> list[Begun]:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if seen := found(self._seen()):
                return seen
            time.sleep(_POLL_S)
        raise TimeoutError(f"{what} did not come within {DEADLINE_S:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recovery")
    parser.add_argument("--kills", type=int, default=8, help="of each contender")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.kills < 2:
        parser.error("--kills: quartiles need two or more")
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        directory, traces = Path(folder) / ".headway", Path(folder) / "traces"
        traces.mkdir()
        try:
            stack = local.up(directory, options(dashboard_port=18266, serve_port=18001), say)
            stack.apply_to(os.environ)
            recoveries = measure(traces, num_kills=asked.kills, chance=random.Random(asked.seed))
        finally:
            local.down(directory, say)
    report(recoveries, seed=asked.seed)


def measure(traces: Path, *, num_kills: int, chance: random.Random) -> dict[str, list[Recovery]]:
    """The contenders' turns, until each has had its kills."""
    import ray

    ray.init(
        address=os.environ["RAY_ADDRESS"],
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {FOLDER_VARIABLE: str(traces)}},
    )
    store = open_store()
    spec, dataset = prepare_data(store)
    recoveries: dict[str, list[Recovery]] = {"headway": [], "plain": []}
    turns = {"headway": headway_turn, "plain": plain_turn}
    while len(recoveries["plain"]) < num_kills:
        for name, turn in turns.items():
            say(f"{name}, {len(recoveries[name])} of {num_kills} kills done")
            killer = Killer(traces, chance, frozenset(read_traces(traces)))
            turn(store, spec, dataset, killer, min(KILLS_A_TURN, num_kills - len(recoveries[name])))
            if killer.error is not None:
                raise killer.error
            recoveries[name] += killer.recoveries
    ray.shutdown()
    return recoveries


def prepare_data(store: Store) -> tuple[RunSpec, tuple[str, str]]:
    """The demo's model and data, for as long as it takes."""
    import yaml

    from workloads.prepare import prepare

    source = upload_corpus(store, Reporter())
    document = yaml.safe_load(RUN_FILE.replace("SOURCE", source))
    document["name"], document["task"] = "recovery", "tests.bench.recovery_trace:TracedLM"
    document["train"]["steps"] = 10**6
    document["checkpoint"] = {"every_steps": EVERY_STEPS, "keep": 2}
    document["resources"]["max_failures"] = 100
    del document["release"], document["gate"]
    spec = parse(document)
    found = prepare(spec.data, spec.name, list(identify(spec, store, Path.cwd()).files), store)
    return spec, (found.name, found.fingerprint)


def headway_turn(store: Store, spec: RunSpec, dataset: tuple[str, str], killer: Killer, num_kills: int) -> None:
    """What the pipeline runs: Ray Train's group of workers with Headway's loop, watchdog and checkpoints."""
    from workloads.cluster import fit
    from workloads.train import TrainJob

    attempt = claim_attempt(store, f"recovery-{secrets.token_hex(4)}", facts={})
    job = TrainJob(
        store=store.uri,
        spec=spec,
        run_id=attempt.run_id,
        attempt=attempt.number,
        attempt_nonce=attempt.nonce,
        dataset=dataset,
        total_steps=spec.train.steps or 0,
    )
    with killing(killer, num_kills, lambda: request_stop(store, attempt.run_id, attempt.number, reason="bench")):
        fit(job, attempt.run_id, say=say, note=lambda *_, **__: None)


def plain_turn(store: Store, spec: RunSpec, dataset: tuple[str, str], killer: Killer, num_kills: int) -> None:
    """The same loop as a person would write it with Ray Train and DeepSpeed alone, its checkpoints in the same S3."""
    import ray.train
    import ray.train.torch

    stop_file = killer.folder.parent / f"stop-{secrets.token_hex(4)}"
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    trainer = ray.train.torch.TorchTrainer(
        train_plain,
        train_loop_config={
            "store": store.uri,
            "spec": spec.model_dump(mode="json"),
            "dataset": dataset,
            "stop_file": str(stop_file),
        },
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=stop_file.name,
            storage_path=f"s3://{store.bucket}/plain?scheme=http&endpoint_override={host}",
            failure_config=ray.train.FailureConfig(max_failures=100),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=spec.checkpoint.keep),
        ),
    )
    with killing(killer, num_kills, stop_file.touch):
        trainer.fit()


class killing:  # noqa: N801  used as a statement
    """Has the killer at work while training runs in this thread, where Ray wants it."""

    def __init__(self, killer: Killer, num_kills: int, stop: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=killer.run, args=(num_kills, stop), name="killer", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def _step_s(seen: list[Begun]) -> float:
    """Seconds of a step, from the newest ones."""
    times = [each.time_s for each in seen if each.rank == 0][-5:]
    return (times[-1] - times[0]) / max(1, len(times) - 1)


def report(recoveries: dict[str, list[Recovery]], *, seed: int) -> None:
    figures: dict[str, Any] = {"seed": seed, "checkpoint_interval_steps": EVERY_STEPS}
    for name, found in recoveries.items():
        figures[name] = {
            "recovery_s": spread([each.seconds for each in found]),
            "first_step_s": spread([each.first_step_s for each in found]),
            "lost_steps": spread([each.lost_steps for each in found]),
            "most_lost_steps": max(each.lost_steps for each in found),
        }
    ratio = figures["headway"]["recovery_s"]["median"] / figures["plain"]["recovery_s"]["median"]
    targets = {
        "recovery over plain's": at_most(ratio, MAX_RATIO),
        "most lost steps": at_most(figures["headway"]["most_lost_steps"], EVERY_STEPS),
    }
    finish("recovery", figures, targets)


if __name__ == "__main__":
    main()
