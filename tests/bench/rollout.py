"""What rollouts cost those who ask: a constant open-loop load on two replicas while versions change below it.

Steady, a promotion, a canary that passes, a canary that answers NaN, a rollback, and a replica that is killed. All of
it shares one machine: the replicas, the decider, Serve's proxy, the S3 server and the load.

    make bench NAME=rollout
    python -m tests.bench.rollout --rate 10 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelStatus
from orchestrator.store import Store
from tests.bench.harness import at_most, finish, say
from tests.bench.rollout_load import PROMPT
from tests.bench.server import s3_store
from tests.integration.serving import CHANNEL, ray_with_serve, replica_pids, wait_for
from tests.tiny_model import make_tokenizer, release_version, save_model

MODEL = "rollout-bench"
MAX_RATIO = 2.0
REPLICAS = 2
CANARY = {"window_s": 5.0, "min_requests": 15, "max_latency_ratio": 10.0}
STEADY_S, AROUND_S, AFTER_KILL_S = 30.0, 10.0, 30.0
"""Each of the two steady phases, before all others and after; how long a rollout is looked on after its end, and a
kill after it."""
ROLLOUTS = ("promote", "canary passes", "canary fails", "rollback")


@dataclass(frozen=True, kw_only=True)
class Answer:
    begun_s: float
    ended_s: float
    status: int
    version: str

    @property
    def seconds(self) -> float:
        return self.ended_s - self.begun_s


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What was done from ``begun_s`` to ``ended_s``. ``version`` is the one that came, if one did."""

    name: str
    begun_s: float
    ended_s: float
    version: int | None = None
    stages_s: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Bench:
    store: Store
    url: str
    directory: Path
    phases: list[Phase] = field(default_factory=list)

    def release(self, seed: int, *, is_broken: bool = False) -> int:
        """A version; a broken one answers its first, other prompt well, and those of the load with NaN."""
        directory = save_model(self.directory / f"model-{seed}", seed=seed)
        if is_broken:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory)
            with torch.no_grad():
                model.get_input_embeddings().weight[make_tokenizer().encode(PROMPT).ids[0]] = float("nan")
            model.save_pretrained(directory)
        return release_version(self.store, MODEL, directory).number

    def status(self) -> ChannelStatus:
        return channels.read_status(self.store, MODEL, CHANNEL) or ChannelStatus()

    def serves(self, version: int) -> bool:
        found = [(each.serving, each.canary, each.loading) for each in self.status().replicas]
        return len(found) == REPLICAS and set(found) == {(version, None, None)}

    def append(self, version: int, canary: Canary | None = None) -> int:
        entry = channels.append(self.store, MODEL, CHANNEL, version=version, by="bench", reason="", canary=canary)
        return entry.number

    def phase(self, name: str, act: Callable[[], int | None], *, after_s: float = AROUND_S) -> None:
        begun_s = time.time()
        version = act()
        stages_s = {} if version is None else self._stages(version)
        time.sleep(after_s)
        self.phases.append(Phase(name=name, begun_s=begun_s, ended_s=time.time(), version=version, stages_s=stages_s))
        say(f"{name:<14} {time.time() - begun_s:5.1f} s")

    def _stages(self, version: int) -> dict[str, float]:
        """As whichever replica answers logged the load."""
        last = httpx.get(f"{self.url}/healthz").json()["last_load"]
        return {name: seconds for name, seconds in last.items() if name != "version" and last["version"] == version}

    def promote(self, version: int) -> int:
        self.append(version)
        wait_for(lambda: self.serves(version))
        return version

    def canary_passes(self, stable: int, version: int) -> int:
        entry = self.append(stable, Canary(version=version, weight=0.3))
        wait_for(lambda: self.status().promoted.get(entry) == version)
        wait_for(lambda: self.serves(version))
        return version

    def canary_fails(self, stable: int, version: int) -> None:
        self.append(stable, Canary(version=version, weight=0.3))
        wait_for(lambda: version in self.status().rejected)
        wait_for(lambda: self.serves(stable))

    def kill(self) -> None:
        os.kill(replica_pids(MODEL)[0], signal.SIGKILL)


@contextmanager
def load(url: str, rate: float, path: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.bench.rollout_load", f"{url}/v1/completions", MODEL, str(rate), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=90) == 0


def measure(bench: Bench, *, rate: float, num_rounds: int) -> list[Answer]:
    first = bench.release(1)
    seeds = range(10, 10 + 10 * num_rounds, 10)
    rounds = [(bench.release(n), bench.release(n + 1), bench.release(n + 2, is_broken=True)) for n in seeds]
    bench.append(first)
    start_application(bench)
    wait_for(lambda: bench.serves(first), timeout_s=120)
    path = bench.directory / "answers.jsonl"
    with load(bench.url, rate, path):
        time.sleep(AROUND_S)  # the load's own start
        bench.phase("steady", lambda: None, after_s=STEADY_S)
        for second, third, broken in rounds:
            bench.phase("promote", lambda second=second: bench.promote(second))
            bench.phase("canary passes", lambda second=second, third=third: bench.canary_passes(second, third))
            bench.phase("canary fails", lambda third=third, broken=broken: bench.canary_fails(third, broken))
            bench.phase("rollback", lambda: bench.promote(first))
        bench.phase("steady", lambda: None, after_s=STEADY_S)
        bench.phase("kill", bench.kill, after_s=AFTER_KILL_S)
    return [Answer(**json.loads(line)) for line in path.read_text().splitlines()]


def start_application(bench: Bench) -> None:
    from ray import serve

    from workloads.serve.app import build

    arguments = {"model": MODEL, "store": bench.store.uri, "num_replicas": REPLICAS, "canary": CANARY, "num_threads": 1}
    serve.run(build(arguments), name=MODEL, route_prefix="/bench")


def report(phases: Sequence[Phase], answers: Sequence[Answer]) -> None:
    figures: dict[str, Any] = {}
    for name in ("steady", *ROLLOUTS, "kill"):
        these = [phase for phase in phases if phase.name == name]
        found = [each for each in answers for phase in these if phase.begun_s <= each.begun_s < phase.ended_s]
        figures[name] = {
            "requests": len(found),
            **quantiles(found),
            "failed": sum(each.status != 200 for each in found),
        }
        figures[name]["times_steady"] = round(figures[name]["p99_s"] / figures["steady"]["p99_s"], 2)
        say(f"{name:<14} {figures[name]}")
    figures["to_first_answer"] = [first_answer(phase, answers) for phase in phases if phase.name == "promote"]
    say(f"from the entry to the first answer: {figures['to_first_answer']}")
    killed_s = next(phase.begun_s for phase in phases if phase.name == "kill")
    failed = [each for each in answers if each.status != 200]
    lost = [each for each in failed if each.begun_s < killed_s < each.ended_s]  # on the killed replica's socket
    for each in failed:
        say(f"failed: {each}")
    targets = {
        "failed requests": at_most(len(failed) - len(lost), 0),
        **{f"p99 of {name} over steady": at_most(figures[name]["times_steady"], MAX_RATIO) for name in ROLLOUTS},
    }
    finish("rollout", figures, targets)


def quantiles(answers: Sequence[Answer]) -> dict[str, float]:
    hundredths = statistics.quantiles([each.seconds for each in answers], n=100)
    return {"p50_s": round(hundredths[49], 4), "p99_s": round(hundredths[98], 4)}


def first_answer(phase: Phase, answers: Sequence[Answer]) -> dict[str, float]:
    """From the entry to the end of the new version's first answer, and the stages of its load."""
    name = f"{MODEL}@{phase.version}"
    ended_s = min(each.ended_s for each in answers if each.version == name and each.begun_s >= phase.begun_s)
    stages = {stage: round(seconds, 3) for stage, seconds in phase.stages_s.items()}
    return {"first_answer_s": round(ended_s - phase.begun_s, 3), **stages}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rollout")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--rounds", type=int, default=2, help="of a promotion, two canaries and a rollback")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        directory = Path(folder)
        with s3_store(directory) as store, ray_with_serve(directory / "cache") as port:
            bench = Bench(store=store, url=f"http://127.0.0.1:{port}/bench", directory=directory)
            answers = measure(bench, rate=asked.rate, num_rounds=asked.rounds)
    report(bench.phases, answers)


if __name__ == "__main__":
    main()
