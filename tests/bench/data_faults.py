"""Reading where every request takes 30 ms longer and 1 % of them are answered 503: how much slower, and who waits.

All through the proxy of tests/faults on loopback, with and without its latency and refusals, so that only these differ;
and past it. Each pass is a process of its own with an empty cache. One more trains, once and for three minutes: a sleep
for each step, as long as makes it want a million tokens a second, some ten times what a GPU takes for a model of a
billion parameters.

    make bench NAME=data_faults
    python -m tests.bench.data_faults --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from orchestrator.dataset.torch import TokenDataset
from orchestrator.store import Store
from tests.bench import reader_data
from tests.bench.harness import at_least, at_most, finish, say, spread
from tests.bench.server import s3_store
from tests.faults.proxy import Fault, FaultProxy, Kind

LATENCY_S = 0.03
REFUSED_SHARE = 0.01
SEQUENCE_LENGTH, BATCH_SIZE = 2048, 32
NUM_STEPS = 6_000
NUM_TOKENS = NUM_STEPS * BATCH_SIZE * SEQUENCE_LENGTH + 1
"""393 M, so that 1 % of the requests is some of them."""
MIN_OF_PLAIN = 0.8
MAX_WAITING = 0.01
TRAINING_TOKENS_PER_S = 1e6
NUM_TRAINING_STEPS = 2_750
_PASS_S = 300.0
_PIECES = r"/train-\d+\.bin$"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data_faults")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    taken: dict[str, list[dict[str, Any]]] = {"direct": [], "proxy": [], "faults": []}
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        rng = np.random.default_rng(0)
        reader_data.write_headway(store, rng.integers(0, reader_data.VOCABULARY, NUM_TOKENS, dtype=np.uint16))
        with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            for number in range(rounds):
                for name, passes in taken.items():
                    passes.append(one_pass(name, store, proxy, Path(folder) / "cache", seed=number))
                    say(f"{name}: {passes[-1]}")
            training = one_pass("training", store, proxy, Path(folder) / "cache", seed=rounds)
    figures: dict[str, Any] = {name: figures_of(passes) for name, passes in taken.items()}
    finish("data_faults", {**figures, "training": training}, targets_of(taken, training))


def one_pass(name: str, store: Store, proxy: FaultProxy, cache: Path, *, seed: int) -> dict[str, Any]:
    """A pass of the reader in the setting of that name."""
    shutil.rmtree(cache, ignore_errors=True)
    proxy.clear()
    has_faults = name in ("faults", "training")
    proxy.latency_s = LATENCY_S if has_faults else 0.0
    if has_faults:
        proxy.add(*refusals(seed))
    environment = dict(os.environ) if name == "direct" else os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint_url}
    is_training = name == "training"
    step_s = BATCH_SIZE * SEQUENCE_LENGTH / TRAINING_TOKENS_PER_S if is_training else 0.0
    num_steps = NUM_TRAINING_STEPS if is_training else NUM_STEPS
    command = [sys.executable, "-m", "tests.bench.data_faults", "read", store.uri, str(cache)]
    command += [str(step_s), str(num_steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=_PASS_S)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    met = sum(request.fault is not None for request in proxy.requests)
    return figures | {"step_s": step_s, "requests": len(proxy.requests), "refused": met}


def refusals(seed: int) -> list[Fault]:
    """503 for each ``REFUSED_SHARE`` of the requests for pieces, at places drawn from ``seed``."""
    every = round(1 / REFUSED_SHARE)
    rng = Random(seed)
    places = [start + rng.randint(1, every) for start in range(0, 10 * every, every)]
    return [Fault(kind=Kind.REFUSE, method="GET", key=_PIECES, nth=place, status=503) for place in places]


def read(uri: str, cache: str, step_s: float, num_steps: int) -> None:
    """Take the batches, with a step of ``step_s`` after each, and print the figures as JSON."""
    dataset = TokenDataset(
        reader_data.REFERENCE,
        store=uri,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        num_steps=num_steps,
        cache=cache,
    )
    began_s = time.perf_counter()
    batches = iter(dataset)
    num_rows = len(next(batches)["tokens"])
    first_s = time.perf_counter() - began_s
    waits_s = []
    for _ in range(1, num_steps):
        if step_s:
            time.sleep(step_s)
        asked_s = time.perf_counter()
        num_rows += len(next(batches)["tokens"])
        waits_s.append(time.perf_counter() - asked_s)
    wall_s = time.perf_counter() - began_s
    if num_rows != num_steps * BATCH_SIZE:
        raise RuntimeError(f"{num_rows} rows came")
    figures = {
        "wall_s": wall_s,
        "first_s": first_s,
        "waited_s": sum(waits_s),
        "waited_late_s": sum(waits_s[num_steps // 2 :]),
        "longest_wait_s": max(waits_s),
        "usual_wait_s": median(waits_s),
    }
    print(json.dumps({name: round(value, 6) for name, value in figures.items()}), flush=True)


def figures_of(passes: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [NUM_TOKENS / 1e6 / each["wall_s"] for each in passes]
    return {
        "Mtokens_per_s": spread(rates),
        "first_s": spread([each["first_s"] for each in passes]),
        "requests": passes[-1]["requests"],
        "refused": passes[-1]["refused"],
    }


def waiting_share(figures: dict[str, Any]) -> float:
    """Of the time after the first batch."""
    return float(figures["waited_s"] / (figures["wall_s"] - figures["first_s"]))


def targets_of(taken: dict[str, list[dict[str, Any]]], training: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ratios are of one round. Pure."""
    ratios = [plain["wall_s"] / slow["wall_s"] for plain, slow in zip(taken["proxy"], taken["faults"], strict=True)]
    return {
        "tokens/s with latency and faults, over without": at_least(median(ratios), MIN_OF_PLAIN),
        "share of time that training waits": at_most(waiting_share(training), MAX_WAITING),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        read(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
