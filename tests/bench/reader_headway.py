"""Headway's own reader, by its threads alone or in the workers of a DataLoader. WORKERS 0 means the threads alone."""

from __future__ import annotations

import os

from torch.utils.data import DataLoader

from orchestrator.dataset.torch import TokenDataset
from tests.bench.reader_pass import BATCH_SIZE, NUM_SAMPLES, SEQUENCE_LENGTH, measure, run


def read(cache: str, workers: int) -> None:
    dataset = TokenDataset(
        os.environ["BENCH_DATASET"],
        store=os.environ["BENCH_STORE"],
        split="train",
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        cache=cache,
        num_steps=NUM_SAMPLES // BATCH_SIZE,
    )
    steps = DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset
    measure(step["tokens"] for step in steps)


if __name__ == "__main__":
    run(None, read)
