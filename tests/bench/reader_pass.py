"""One pass over all samples by one contender of reader.py, in a process of its own: what it took, and what came."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.bench.proc import child_pids, cpu_seconds

SEQUENCE_LENGTH = 2048
ROW_TOKENS = SEQUENCE_LENGTH + 1
BATCH_SIZE = 32
NUM_SAMPLES = 40_000
NUM_TOKENS = NUM_SAMPLES * ROW_TOKENS
"""82 M, as they are given out: two neighbours share the token between them."""
SHARD_BYTES = 64 * 2**20
SHARD_SAMPLES = SHARD_BYTES // (2 * ROW_TOKENS)

_STARTED_S = time.perf_counter()
_MARKED = slice(
    None, None, 128
)  # these tokens of a sample tell it from all others, and cost next to nothing to look at


def digest_of(samples: npt.NDArray[Any]) -> str:
    """Of a set of samples, shape (N, tokens looked at), whatever their order: each must be there as often."""
    rows = np.ascontiguousarray(samples.astype("<u2"))
    return hashlib.sha256(b"".join(sorted(row.tobytes() for row in rows))).hexdigest()


def expected_digest(samples: npt.NDArray[np.uint16]) -> str:
    """Of all samples, shape (N, ROW_TOKENS)."""
    return digest_of(samples[:, _MARKED])


def measure(batches: Iterable[torch.Tensor]) -> None:
    """Take all batches, shape (≤ BATCH_SIZE, ROW_TOKENS), int64, and print the figures as JSON.

    The clock starts with the call of ``iter``; what was imported and opened before is told as ``setup_s``. CPU time is
    that of this process and all its children, to the end of those that end with the iterator.
    """
    torch.set_num_threads(1)  # for a batch of this size the threads of a tensor operation wait longer than they work
    seen = []
    cpu_s, started_s = _cpu_s(), time.perf_counter()
    last_s = first_s = 0.0
    for batch in batches:
        if batch.dtype != torch.int64 or batch.shape[0] > BATCH_SIZE or batch.shape[1] != ROW_TOKENS:
            raise ValueError(f"a batch of {batch.dtype}, {tuple(batch.shape)}")
        seen.append(batch[:, _MARKED].numpy().copy())
        last_s = time.perf_counter()
        first_s = first_s or last_s
    used_s = _cpu_s() - cpu_s
    found = np.concatenate(seen)
    figures = {
        "setup_s": started_s - _STARTED_S,
        "first_s": first_s - started_s,
        "wall_s": last_s - started_s,
        "cpu_s": used_s,
        "samples": len(found),
        "digest": digest_of(found),
    }
    print(json.dumps(figures), flush=True)


def _cpu_s() -> float:
    """User and system time of this process, its children that have ended, and those that live with all of theirs."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_tree_s, child_pids(os.getpid())))


def _tree_s(pid: int) -> float:
    try:
        return cpu_seconds(pid) + sum(map(_tree_s, child_pids(pid)))
    except FileNotFoundError:  # it has just ended
        return 0.0


def run(write: Callable[[npt.NDArray[np.uint16], str], None] | None, read: Callable[[str, int], None]) -> None:
    """A contender's ``main``: ``write SAMPLES DIRECTORY`` makes what it reads, from a file of numpy's, and
    ``read CACHE WORKERS`` measures."""
    match sys.argv[1:]:
        case ["write", samples, directory] if write:
            write(np.load(samples, mmap_mode="r"), directory)
        case ["read", cache, workers]:
            read(cache, int(workers))
        case _:
            raise SystemExit("usage: write SAMPLES DIRECTORY, or read CACHE WORKERS")
