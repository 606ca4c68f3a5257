"""Resuming a real ZeRO engine on gloo ranks: seconds, and bytes read by each rank.

At the same size, Headway's resume from S3 against DeepSpeed's load of its own checkpoint, with and without its
download from S3. At another size (2 ranks to 3), Headway's same resume against DeepSpeed's ds_to_universal and load
of what that made. Both checkpoints are of the same state, both loads fill the same engine in turns, and each rank
checks every element that it holds after each load.

A load's time is that of the slowest rank. Bytes read are, for Headway, all that a rank got from the store: manifest,
indexes and data; for DeepSpeed, all that its process read from files (``rchar`` of ``/proc/self/io``); for the
conversion, what its processes read, their imports included. Files that DeepSpeed loads were written a moment
before, so they lie in the page cache.

The largest case takes 20 GB of memory, 30 GB of disk and some minutes: ZeRO-1 would take more, since DeepSpeed then
reads all ranks' files on each.

    make bench NAME=resume
    python -m tests.bench.resume --cases 3:4,1:4 --repeats 2
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from orchestrator.checkpoint.resume import resume_newest
from orchestrator.store import Store, open_store
from tests.bench import states
from tests.bench.harness import at_least, at_most, bench_ranks, finish, say, spread
from tests.bench.server import download_directory, s3_store, upload_directory
from tests.bench.states import TAG, Size
from tests.gloo_ranks import Ranks

SAVED_BY, OTHER_SIZE = 2, 3
LARGE_PARAMETERS = 500e6
MAX_BYTES_RATIO = {"large": 1.05, "small": 1.3}
MAX_UNIVERSAL_RATIO = 0.5
CONVERT = "deepspeed.checkpoint.ds_to_universal"


@dataclass(frozen=True, kw_only=True)
class Load:
    """One rank's load. ``is_right``: afterwards it held what was saved, all of it."""

    seconds: float
    bytes_read: int
    is_right: bool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.resume")
    parser.add_argument(
        "--cases", default="3:60,1:60,3:500", help=f"ZeRO stage:size, of {', '.join(states.SIZES)} (million parameters)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        for case in args.cases.split(","):
            stage, name = case.split(":")
            bench = Case(store, int(stage), states.SIZES[name], Path(folder), repeats=args.repeats)
            figures[f"ZeRO-{stage}, {name} M"] = bench.measure()
    finish("resume", {"cases": figures}, targets_of(figures))


class Case:
    """One model under one ZeRO stage."""

    def __init__(self, store: Store, stage: int, size: Size, scratch: Path, *, repeats: int) -> None:
        self._store, self._stage, self._size, self._repeats = store, stage, size, repeats
        self._run = f"bench-resume-{stage}-{size.name}"
        self._remote = f"deepspeed/{self._run}/"
        self._saved, self._universal = scratch / "saved", scratch / "universal"

    def measure(self) -> dict[str, Any]:
        with bench_ranks(SAVED_BY) as ranks:
            built = self._build(ranks, load_universal=False)
            self._save(ranks)
            same = self._take_turns(ranks, built, self._load_own)
        with bench_ranks(OTHER_SIZE) as ranks:
            built = self._build(ranks, load_universal=True)
            other = self._take_turns(ranks, built, self._load_universal)
        return {"parameters": built[0][0], "same_size": same, "other_size": other}

    def _build(self, ranks: Ranks, *, load_universal: bool) -> list[tuple[int, int]]:
        started = time.perf_counter()
        built: list[tuple[int, int]] = ranks.run(states.build, self._size, self._stage, load_universal)
        self._say(f"{len(built)} engines of {built[0][0] / 1e6:.0f} M parameters", started)
        return built

    def _save(self, ranks: Ranks) -> None:
        started = time.perf_counter()
        ranks.run(states.fill)
        ranks.run(states.save_headway, self._store.uri, states.claim(self._store, self._run))
        ranks.run(states.save_deepspeed, str(self._saved))
        self._say("saved", started)
        upload_directory(self._saved, self._remote)
        shutil.rmtree(self._saved)
        self._say("saved and uploaded", started)

    def _take_turns(
        self, ranks: Ranks, built: list[tuple[int, int]], peer: Callable[[Ranks], tuple[dict[str, float], list[Load]]]
    ) -> dict[str, Any]:
        """Headway and ``peer``, one after the other, some times; figures of both."""
        ours, theirs, parts = [], [], []
        for _ in range(self._repeats):
            ranks.run(states.clear)
            ours.append(ranks.run(resume_headway, self._store.uri, self._run))
            self._say(f"Headway's resume {_slowest(ours[-1]):.1f} s")
            ranks.run(states.clear)
            before, loads = peer(ranks)
            theirs.append(loads)
            parts.append({**before, "load": _slowest(loads)})
            self._say("DeepSpeed's " + ", ".join(f"{name} {value:,.1f}" for name, value in parts[-1].items()))
        owned = [num_bytes for _, num_bytes in built]
        return {
            "headway": _figures(ours, owned),
            "deepspeed": {
                **_figures(theirs, owned),
                **{name: spread([part[name] for part in parts]) for name in parts[0] if name != "load"},
            },
        }

    def _load_own(self, ranks: Ranks) -> tuple[dict[str, float], list[Load]]:
        download_s = self._download()
        loads = ranks.run(load_deepspeed, str(self._saved), TAG)
        shutil.rmtree(self._saved)
        return {"download_s": download_s}, loads

    def _load_universal(self, ranks: Ranks) -> tuple[dict[str, float], list[Load]]:
        download_s = self._download()
        started, read_before = time.perf_counter(), _bytes_read()
        subprocess.run(
            [
                *(sys.executable, "-m", CONVERT, "--inject_missing_state"),
                *("--input_folder", str(self._saved / TAG), "--output_folder", str(self._universal / TAG)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        conversion_s, conversion_bytes = time.perf_counter() - started, _bytes_read() - read_before
        shutil.rmtree(self._saved)
        loads = ranks.run(load_deepspeed, str(self._universal), TAG)
        shutil.rmtree(self._universal)
        return {
            "download_s": download_s,
            "conversion_s": conversion_s,
            "conversion_read_mb": conversion_bytes / 1e6,
        }, loads

    def _download(self) -> float:
        started = time.perf_counter()
        download_directory(self._remote, self._saved)
        return time.perf_counter() - started

    def _say(self, what: str, started: float | None = None) -> None:
        took = "" if started is None else f": {time.perf_counter() - started:.0f} s"
        say(f"ZeRO-{self._stage}, {self._size.name} M, {what}{took}")


# -- work for the ranks


class CountingStore(Store):
    """Counts the bytes of objects that it was asked for."""

    bytes_read = 0

    def get(self, key: str) -> bytes:
        return self._counted(super().get(key))

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        return self._counted(super().get_range(key, start, num_bytes))

    def _counted(self, data: bytes) -> bytes:
        self.bytes_read += len(data)
        return data


def resume_headway(store_uri: str, run_id: str) -> Load:
    held, plain = states.held(), open_store(store_uri)
    store = CountingStore(plain.bucket, plain.prefix)
    started = states.timed_barrier()
    resumed = resume_newest(store, run_id, held.state, held.engine.module, rank=distributed.get_rank())
    seconds = time.perf_counter() - started
    assert resumed is not None
    return Load(seconds=seconds, bytes_read=store.bytes_read, is_right=states.matches())


def load_deepspeed(directory: str, tag: str) -> Load:
    held = states.held()
    started, read_before = states.timed_barrier(), _bytes_read()
    held.engine.load_checkpoint(directory, tag=tag)
    seconds, bytes_read = time.perf_counter() - started, _bytes_read() - read_before
    return Load(seconds=seconds, bytes_read=bytes_read, is_right=states.matches())


def _bytes_read() -> int:
    """Bytes that this process, and the children that it waited for, got from read calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


# -- figures


def _slowest(loads: list[Load]) -> float:
    return max(load.seconds for load in loads)


def _figures(repeats: list[list[Load]], owned: list[int]) -> dict[str, Any]:
    """Of one contender, over its repeats. ``owned``: bytes of masters and moments of each rank. Pure."""
    reads = [loads[rank].bytes_read for loads in repeats for rank in range(len(owned))]
    ratios = [loads[rank].bytes_read / owned[rank] for loads in repeats for rank in range(len(owned))]
    return {
        "load_s": spread([_slowest(loads) for loads in repeats]),
        "read_mb_per_rank": round(max(reads) / 1e6, 2),
        "read_over_partition": round(max(ratios), 4),
        "is_right": all(load.is_right for loads in repeats for load in loads),
    }


def targets_of(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians against the limits. The universal path counts from the files on the local disk on, without their
    download. Pure."""
    targets = {}
    for case, found in figures.items():
        limit = MAX_BYTES_RATIO["large" if found["parameters"] >= LARGE_PARAMETERS else "small"]
        for which in ("same_size", "other_size"):
            ours = found[which]["headway"]
            targets[f"{case}, {which}: bytes read over the partition's"] = at_most(ours["read_over_partition"], limit)
            targets[f"{case}, {which}: state is right"] = at_least(int(ours["is_right"]), 1)
        theirs = found["other_size"]["deepspeed"]
        universal_s = theirs["conversion_s"]["median"] + theirs["load_s"]["median"]
        targets[f"{case}: seconds over the universal path's"] = at_most(
            found["other_size"]["headway"]["load_s"]["median"] / universal_s, MAX_UNIVERSAL_RATIO
        )
    return targets


if __name__ == "__main__":
    main()
