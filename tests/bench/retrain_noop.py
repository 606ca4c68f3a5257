"""``headway retrain`` where nothing has changed, beside a bare listing of the source: what CI pays on a quiet day.

The source is 100,000 objects in S3, of a run that is done. Both are whole processes, from the interpreter's start to
its end, and take turns: ``headway retrain --json``, and boto3's paginator over the same prefix, which counts them.

    make bench NAME=retrain_noop
    python -m tests.bench.retrain_noop --objects 10000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.runs import identify
from orchestrator.spec import load
from orchestrator.starter import STARTER
from orchestrator.store import Store
from tests.bench.harness import at_most, finish, say, spread
from tests.bench.server import s3_store

MAX_RATIO = 1.2
SOURCE = "source"
BARE = """
import sys
import boto3
pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=sys.argv[1], Prefix=sys.argv[2])
print(sum(len(page.get("Contents", ())) for page in pages))
"""
_WRITERS = 16
_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.retrain_noop")
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_store(Path(folder)) as store:
        _fill(store, options.objects)
        run_file = _finished_run(store, Path(folder))
        ours, bare = [], []
        for number in range(options.rounds):
            ours.append(_retrain(run_file, store))
            bare.append(_list(store, options.objects))
            say(f"round {number + 1}: retrain {ours[-1]:.2f} s, bare listing {bare[-1]:.2f} s")
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    finish(
        "retrain_noop",
        {"objects": options.objects, "retrain_s": spread(ours), "listing_s": spread(bare), "ratio": spread(ratios)},
        {"ratio": at_most(statistics.median(ratios), MAX_RATIO)},
    )


def _fill(store: Store, num_objects: int) -> None:
    began_s = time.monotonic()
    place = store.at(store.bucket, SOURCE)

    def put(number: int) -> None:
        place.upload(f"{number // _FOLDER:03d}/{number:06d}.txt", f"text {number}".encode())

    with ThreadPoolExecutor(_WRITERS) as pool:
        for number, _ in enumerate(pool.map(put, range(num_objects)), start=1):
            if number % 10_000 == 0:
                say(f"{number:,} objects written")
    say(f"the source took {time.monotonic() - began_s:.0f} s")


def _finished_run(store: Store, folder: Path) -> Path:
    """A run file on the source, whose run is done."""
    run_file = folder / "run.yaml"
    data = {"train": f"s3://{store.bucket}/{SOURCE}/**/*.txt"}
    run_file.write_text(yaml.safe_dump({**yaml.safe_load(STARTER), "data": data}))
    run_id = identify(load(run_file), store, folder).run_id
    commit_outcome(store, Outcome(run_id=run_id, state="done", attempt=1, ended_s=time.time()))
    return run_file


def _retrain(run_file: Path, store: Store) -> float:
    command = [str(Path(sys.executable).with_name("headway")), "retrain", str(run_file), "--store", store.uri, "--json"]
    seconds, out = _timed(command, run_file.parent)
    assert json.loads(out)["outcome"] == "unchanged", out
    return seconds


def _list(store: Store, num_objects: int) -> float:
    seconds, out = _timed([sys.executable, "-c", BARE, store.bucket, f"{SOURCE}/"], Path.cwd())
    assert int(out) == num_objects, out
    return seconds


def _timed(command: list[str], directory: Path) -> tuple[float, str]:
    began_s = time.perf_counter()
    done = subprocess.run(command, cwd=directory, env=os.environ, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - began_s, done.stdout


if __name__ == "__main__":
    main()
