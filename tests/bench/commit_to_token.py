"""From the commit of a run's last checkpoint to the first token of the version that it became, and where the time went.

A local stack serves the model while the run that makes its next version trains beside it, as a nightly retrain would.
A client asks for one token every tenth of a second and notes which version gave it.

    make bench NAME=commit_to_token
    python -m tests.bench.commit_to_token --rounds 3
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestrator.record import EventReader
from orchestrator.release import channels
from orchestrator.store import Store, open_store
from orchestrator.targets import local, ports
from orchestrator.targets.stack import Stack
from tests.bench.harness import finish, say
from tests.command_line import headway
from tests.tiny_run import TINY_LLAMA

MODEL, STEPS = "commit-to-token", 60
DEADLINE_S = 300.0
STAGES = ("export", "evaluate", "gate", "release")


@contextmanager
def stack_of(folder: Path) -> Iterator[Stack]:
    """A stack of its own, which this process's environment leads to."""
    seed = secrets.randbits(32)
    dashboard = ports.choose([], taken=[], seed=seed)
    serve = ports.choose([], taken=[dashboard], seed=seed)
    directory = folder / ".headway"
    try:
        stack = local.up(directory, local.StackOptions(dashboard_port=dashboard, serve_port=serve, num_cpus=3), say)
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
            del os.environ[name]
        os.environ.update(stack.store_environment())
        yield stack
    finally:
        local.down(directory, say)


def run_file(folder: Path, name: str, store: Store) -> str:
    document: dict[str, Any] = {
        "apiVersion": "headway/v1",
        "name": name,
        "model": {"architecture": TINY_LLAMA},
        "data": {
            "train": f"s3://{store.bucket}/corpus/*.txt",
            "vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32,
        },
        "train": {
            "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "optimizer": {"learning_rate": 3e-3},
        },
        "checkpoint": {"every_steps": STEPS},
        "release": {"model": MODEL},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return f"{name}.yaml"


class Client(threading.Thread):
    """Asks for one token after the other, and notes when each version first gave one."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self._endpoint, self._ended = endpoint, threading.Event()
        self.first_s: dict[str, float] = {}
        self.num_failed = 0

    def run(self) -> None:
        with httpx.Client(timeout=60.0) as http:
            while not self._ended.wait(0.1):
                body = {"model": MODEL, "prompt": "ab", "max_tokens": 1}
                answer = http.post(f"{self._endpoint}/v1/completions", json=body)
                if answer.status_code != 200:
                    self.num_failed += 1
                    continue
                self.first_s.setdefault(answer.headers["x-headway-version"], time.time())

    def first_token_s(self, version: str) -> float:
        deadline_s = time.monotonic() + DEADLINE_S
        while version not in self.first_s:
            assert time.monotonic() < deadline_s, f"{version} answered nothing in {DEADLINE_S:.0f} s"
            time.sleep(0.05)
        return self.first_s[version]

    def end(self) -> None:
        self._ended.set()
        self.join()


def stages_of(store: Store, run_id: str, version: str, first_token_s: float) -> dict[str, float]:
    """Seconds from the commit to the first token, in all and stage by stage."""
    events = list(EventReader(store, run_id).poll())
    committed_s = max(float(each["time_s"]) for each in events if each["kind"] == "checkpoint")
    began = {each["stage"]: float(each["time_s"]) for each in events if each["kind"] == "stage_started"}
    took = {each["stage"]: float(each["seconds"]) for each in events if each["kind"] == "stage_done"}
    entry = channels.newest(store, MODEL, "production")
    assert entry is not None
    assert f"{MODEL}@{entry.version}" == version
    return {
        "all": first_token_s - committed_s,
        "training ends": began["export"] - committed_s,
        **{stage: took[stage] for stage in STAGES},
        "entry to first token": first_token_s - entry.created_s,
    }


def measure(folder: Path, stack: Stack, num_rounds: int) -> tuple[list[dict[str, float]], int]:
    store = open_store()
    corpus, words = store.at(store.bucket, "corpus"), random.Random(5)
    for number in range(40):
        corpus.upload(f"{number:03d}.txt", " ".join("".join(words.choices("abcdef", k=4)) for _ in range(600)).encode())

    def command(*arguments: str) -> dict[str, Any]:
        where = ("--target", stack.dashboard_url, "--json")
        said = headway(
            *arguments, *where, directory=folder, settings=dict(stack.store_environment()), timeout_s=DEADLINE_S
        )
        return said.assert_done().json

    command("submit", run_file(folder, "first", store))
    client = Client(command("serve", MODEL)["endpoint"])
    client.start()
    found = []
    try:
        client.first_token_s(f"{MODEL}@1")
        for number in range(1, num_rounds + 1):
            done = command("submit", run_file(folder, f"next-{number}", store))
            version = done["facts"]["version"]
            found.append(stages_of(store, done["run_id"], version, client.first_token_s(version)))
            say(f"{version}: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in found[-1].items()))
    finally:
        client.end()
    return found, client.num_failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.commit_to_token")
    parser.add_argument("--rounds", type=int, default=3, help="runs, each of which becomes a version")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, stack_of(Path(folder)) as stack:
        found, num_failed = measure(Path(folder), stack, asked.rounds)
    figures = {
        stage: {
            "median_s": round(statistics.median(each[stage] for each in found), 2),
            "all_s": [round(each[stage], 2) for each in found],
        }
        for stage in found[0]
    }
    finish("commit_to_token", {**figures, "failed requests": num_failed}, {})


if __name__ == "__main__":
    main()
