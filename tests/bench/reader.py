"""Tokens per second, and CPU time per token, of reading the same shuffled samples from the same S3 server.

Headway's reader beside litdata, mosaicml-streaming and Ray Data, and beside raw boto3 threads as the limit. Each pass
over all samples is a process of its own, which says what it took and what came; that must be each sample once. Cold is
an empty folder for the cache, warm the same folder again. Workers are DataLoader's, or Ray's CPUs; with 0 a contender
reads in the training process, in what threads it has. The contenders take turns, in each round in another order.

    make bench NAME=reader
    python -m tests.bench.reader --rounds 5 --only "headway;raw"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import reader_data
from tests.bench.harness import at_least, at_most, finish, say, spread
from tests.bench.reader_pass import NUM_TOKENS, expected_digest
from tests.bench.server import s3_store

Case = tuple[str, int, str]
"""Contender, workers, and cold or warm."""
Taken = dict[Case, list[dict[str, Any]]]
"""What each pass took, round by round."""

MIN_OF_RAW = 0.8
MIN_OVER_PEER = 2.0
MAX_CPU_OVER_PEER = 0.5
_PASS_S = 150.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    program: str
    prefix: str = ""
    """Where its data lie, where it writes them itself."""
    workers: tuple[int, ...]
    in_peers: bool = False
    """Whether it needs the peers' environment."""
    has_cache: bool = True
    num_rounds: int = 1_000_000
    """No more than these, for one that takes half a minute a pass."""

    @property
    def is_peer(self) -> bool:
        return self.name not in ("headway", "raw", "raw, kept")


CONTENDERS = (
    Contender(name="headway", program="reader_headway", workers=(0, 1, 2)),
    Contender(name="raw", program="reader_raw", prefix="raw/", workers=(0,), has_cache=False),
    Contender(name="raw, kept", program="reader_raw", workers=(1,), has_cache=False),
    Contender(name="litdata", program="reader_litdata", prefix="litdata/", workers=(0, 1, 2), in_peers=True),
    Contender(name="Ray Data", program="reader_ray", prefix="parquet/", workers=(1, 2), has_cache=False, num_rounds=2),
    Contender(
        name="streaming", program="reader_streaming", prefix="streaming/", workers=(1, 2), in_peers=True, num_rounds=1
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=f"of {'; '.join(contender.name for contender in CONTENDERS)}", default="")
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    only = [name.strip() for name in asked.only.split(";") if name.strip()]
    contenders = [contender for contender in CONTENDERS if not only or contender.name in only]
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        scratch = Path(folder)
        peers = str(reader_data.make_peers_python(scratch / "peers"))
        tokens, samples = reader_data.make_samples()
        reader_data.write_headway(store, tokens)
        for contender in contenders:
            if contender.prefix:
                python = peers if contender.in_peers else sys.executable
                reader_data.write_peer(contender.program, contender.prefix, python, samples, scratch)
        os.environ |= {"BENCH_STORE": store.uri, "BENCH_DATASET": reader_data.REFERENCE}
        taken = measure(contenders, peers, expected_digest(samples), scratch, num_rounds=asked.rounds)
    finish("reader", figures_of(taken), targets_of(taken))


def measure(contenders: list[Contender], peers: str, digest: str, scratch: Path, *, num_rounds: int) -> Taken:
    taken: Taken = {}
    for number in range(num_rounds):
        for contender in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
            if number >= contender.num_rounds:
                continue
            for workers in contender.workers:
                for cache, figures in passes(contender, workers, peers, digest, scratch).items():
                    taken.setdefault((contender.name, workers, cache), []).append(figures)
                    say(told(contender.name, workers, cache, figures))
    return taken


def passes(contender: Contender, workers: int, peers: str, digest: str, scratch: Path) -> dict[str, dict[str, Any]]:
    """A pass with an empty cache, and where it has one, another with what that left. A peer may fail, and is left out.

    Raises:
        CalledProcessError: Headway, or the limit, failed.
        RuntimeError: samples were missing, or came twice.
    """
    cache = scratch / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    python = peers if contender.in_peers else sys.executable
    command = [python, "-W", "ignore", "-m", f"tests.bench.{contender.program}", "read", str(cache), str(workers)]
    found = {}
    for state in ("cold", "warm") if contender.has_cache else ("cold",):
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PASS_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
            say(f"{contender.name} with {workers} workers, {state}, failed:\n{str(e.stderr)[-1500:]}")
            if not contender.is_peer:
                raise
            break
        figures = json.loads(done.stdout.splitlines()[-1])
        if figures.pop("digest") != digest:
            raise RuntimeError(f"{contender.name} gave {figures['samples']} samples, which are not each of them once")
        found[state] = figures
    return found


def rate(figures: dict[str, Any]) -> float:
    """Millions of tokens a second."""
    return NUM_TOKENS / 1e6 / float(figures["wall_s"])


def cpu(figures: dict[str, Any]) -> float:
    """Seconds per 10^9 tokens."""
    return float(figures["cpu_s"]) * 1e9 / NUM_TOKENS


def told(name: str, workers: int, cache: str, figures: dict[str, Any]) -> str:
    return (
        f"{name}, {workers} workers, {cache}: {rate(figures):.1f} Mtokens/s, {cpu(figures):.1f} CPU s per 10^9, "
        f"first batch after {figures['first_s']:.2f} s, set-up {figures['setup_s']:.1f} s"
    )


def figures_of(taken: Taken) -> dict[str, Any]:
    """Medians and quartiles of each case; what was measured once is told as it was. Pure."""
    figures: dict[str, Any] = {}
    for (name, workers, cache), rounds in taken.items():
        columns = {
            "Mtokens_per_s": [rate(each) for each in rounds],
            "cpu_s_per_1e9": [cpu(each) for each in rounds],
            "first_s": [each["first_s"] for each in rounds],
            "setup_s": [each["setup_s"] for each in rounds],
        }
        figures[f"{name}, {workers} workers, {cache}"] = {
            column: spread(values) if len(values) > 1 else {"median": round(values[0], 4), "n": 1}
            for column, values in columns.items()
        }
    return figures


def targets_of(taken: Taken) -> dict[str, dict[str, Any]]:
    """Headway's threads alone against the limit, and against whichever peer is best at each, at any number of workers.

    Ratios are of one round, since the machine changes more from round to round than within one. A peer without a cache
    competes with its cold figures where Headway's cache is warm. Pure.
    """
    targets = {}
    raw = taken.get(("raw", 0, "cold"))
    if raw:
        targets["tokens/s over raw, cold"] = at_least(_ratio(taken["headway", 0, "cold"], raw, rate), MIN_OF_RAW)
    for cache in ("cold", "warm"):
        ours = taken.get(("headway", 0, cache))
        peers = [rounds for case, rounds in taken.items() if _competes(case, cache)]
        if not ours or not peers:
            continue
        fastest = max(peers, key=lambda rounds: median(map(rate, rounds)))
        cheapest = min(peers, key=lambda rounds: median(map(cpu, rounds)))
        targets[f"tokens/s over the best peer's, {cache}"] = at_least(_ratio(ours, fastest, rate), MIN_OVER_PEER)
        targets[f"CPU a token over the best peer's, {cache}"] = at_most(_ratio(ours, cheapest, cpu), MAX_CPU_OVER_PEER)
    return targets


def _competes(case: Case, cache: str) -> bool:
    """Whether it is a peer's case, with that cache or, where the peer has none, without."""
    for contender in CONTENDERS:
        if contender.name == case[0]:
            return contender.is_peer and (case[2] == cache or not contender.has_cache)
    return False


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], figure: Any) -> float:
    ratios = [figure(mine) / figure(other) for mine, other in zip(ours, theirs, strict=False)]
    return float(median(ratios))


if __name__ == "__main__":
    main()
