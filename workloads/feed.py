"""One rank's batches: which rows of the global batch, read and collated one step ahead of their use."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.plan import BatchSplit
from orchestrator.spec import RunSpec
from orchestrator.store import Store
from workloads.tasks import Batch, Samples, Task


def open_feed(
    spec: RunSpec,
    store: Store,
    manifest: DatasetManifest,
    task: Task,
    split: BatchSplit,
    *,
    rank: int,
    device: torch.device,
) -> BatchFeed:
    """This rank's feed of the training split.

    Raises:
        RunError: the split does not fill one batch. IntegrityError, StoreError: its shards cannot be had.
    """
    reader = TokenReader(store, manifest, manifest.train, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=spec.train.global_batch_size, what="train")
    order = SampleOrder(fingerprint=manifest.fingerprint, seed=spec.train.seed, num_samples=reader.num_samples)
    return BatchFeed(task, reader, order, split, rank=rank, seed=spec.train.seed, device=device)


class BatchFeed:
    """This rank's micro-batches of each step, built one step ahead on a thread."""

    def __init__(
        self,
        task: Task,
        reader: TokenReader,
        order: SampleOrder,
        split: BatchSplit,
        *,
        rank: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._task, self._reader, self._order, self._split = task, reader, order, split
        self._rows = split.rows_of(rank)
        self._seed, self._device = seed, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Any] = {}
        self._waited_s = 0.0

    def prefetch(self, step: int) -> None:
        if step not in self._ahead:
            self._ahead[step] = self._pool.submit(self._build, step)

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``: ``accumulation`` of them with ``micro_rows`` rows each."""
        self.prefetch(step)
        started = time.perf_counter()
        batches: list[Batch] = self._ahead.pop(step).result()
        self._waited_s += time.perf_counter() - started
        if self._device.type == "cpu":
            return batches
        return [{k: v.to(self._device, non_blocking=True) for k, v in batch.items()} for batch in batches]

    def waited_s(self) -> float:
        """Seconds that :meth:`take` had to wait for steps that were not built yet, since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _build(self, step: int) -> list[Batch]:
        indices = self._order.batch(step, self._split.global_batch_size)
        batches = []
        for micro in range(self._split.accumulation):
            start = self._rows.start + micro * self._split.micro_rows
            mine = range(min(start, self._rows.stop), min(start + self._split.micro_rows, self._rows.stop))
            padded = [*mine, *[self._rows.start] * (self._split.micro_rows - len(mine))]
            samples = Samples(
                rows=self._reader.rows(indices[padded]),
                num_real=len(mine),
                row_rng=partial(_row_rng, self._seed, step, padded),
            )
            batches.append(self._task.collate(samples))
        return batches


def _row_rng(seed: int, step: int, rows: list[int], row: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, rows[row]])
