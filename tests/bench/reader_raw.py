"""The limit: boto3 in threads, with ranged GETs, the same digests and the same copies into batches, and nothing else.

It neither shuffles nor tries again. With WORKERS 0 it streams; with 1 it also keeps what it fetched in a file, as a
cache does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import numpy.typing as npt
import torch
from botocore.config import Config

from tests.bench.reader_pass import BATCH_SIZE, ROW_TOKENS, SHARD_SAMPLES, measure, run
from tests.bench.server import BUCKET

PREFIX = "raw/"
THREADS = 8
PIECE_SAMPLES = 1024  # 4 MiB


def write(samples: npt.NDArray[np.uint16], directory: str) -> None:
    """Shards of whole samples, and what their pieces hash to."""
    pieces = []
    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        data = samples[start : start + SHARD_SAMPLES].tobytes()
        (Path(directory) / f"{number:05d}.bin").write_bytes(data)
        size = PIECE_SAMPLES * ROW_TOKENS * 2
        for at in range(0, len(data), size):
            part = data[at : at + size]
            pieces.append((f"{number:05d}.bin", at, len(part), hashlib.sha256(part).hexdigest()))
    (Path(directory) / "pieces.json").write_text(json.dumps(pieces))


def read(cache: str, workers: int) -> None:
    client = boto3.client("s3", config=Config(max_pool_connections=THREADS))
    pieces = json.loads(client.get_object(Bucket=BUCKET, Key=f"{PREFIX}pieces.json")["Body"].read())
    measure(_batches(client, pieces, Path(cache) if workers else None))


def _batches(client: Any, pieces: list[tuple[str, int, int, str]], cache: Path | None) -> Iterator[torch.Tensor]:
    with ThreadPoolExecutor(THREADS) as pool:
        for future in as_completed([pool.submit(_fetch, client, cache, *piece) for piece in pieces]):
            yield from future.result()


def _fetch(client: Any, cache: Path | None, file: str, start: int, size: int, digest: str) -> list[torch.Tensor]:
    span = f"bytes={start}-{start + size - 1}"
    data = client.get_object(Bucket=BUCKET, Key=PREFIX + file, Range=span)["Body"].read()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{file} at {start} is damaged")
    if cache:
        keep(cache / file, data, start)
    rows = np.frombuffer(data, dtype="<u2").reshape(-1, ROW_TOKENS)
    return [torch.from_numpy(rows[at : at + BATCH_SIZE].astype(np.int64)) for at in range(0, len(rows), BATCH_SIZE)]


def keep(path: Path, data: bytes, start: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(file, data, start)
    finally:
        os.close(file)


if __name__ == "__main__":
    run(write, read)
