"""One rank's batches: which rows of the global batch, read and collated one step ahead of their use."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.dataset.ahead import ReadAhead
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
    num_steps: int,
    device: torch.device,
) -> BatchFeed:
    """This rank's feed of the training split.

    Raises:
        RunError: the split does not fill one batch. IntegrityError, StoreError: its shards cannot be had.
    """
    reader = TokenReader(store, manifest, manifest.train, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=spec.train.global_batch_size, what="train")
    order = SampleOrder(
        fingerprint=manifest.fingerprint,
        seed=spec.train.seed,
        num_samples=reader.num_samples,
        global_batch_size=spec.train.global_batch_size,
        sequence_length=spec.data.sequence_length,
    )
    numbers = ReadAhead(reader, order, split.rows_of(rank), num_steps=num_steps).take
    return BatchFeed(task, reader, numbers, split, rank=rank, seed=spec.train.seed, device=device)


class BatchFeed:
    """This rank's micro-batches of each step, built one step ahead on a thread.

    Args:
        numbers: the samples of this rank's rows of a step.
    """

    def __init__(
        self,
        task: Task,
        reader: TokenReader,
        numbers: Callable[[int], npt.NDArray[np.int64]],
        split: BatchSplit,
        *,
        rank: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._task, self._reader, self._seed, self._split = task, reader, seed, split
        self._rows = split.rows_of(rank)
        self._numbers = numbers
        self._device, self._pins = device, device.type == "cuda"
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
        self._reader.close()

    def counts(self) -> dict[str, int]:
        """What was read for this rank so far, as :meth:`orchestrator.dataset.fetch.Fetcher.counts` says it."""
        return self._reader.counts()

    def _build(self, step: int) -> list[Batch]:
        indices = self._numbers(step)
        batches = []
        for micro in range(self._split.accumulation):
            start = self._rows.start + micro * self._split.micro_rows
            mine = range(min(start, self._rows.stop), min(start + self._split.micro_rows, self._rows.stop))
            padded = [*mine, *[self._rows.start] * (self._split.micro_rows - len(mine))]
            samples = Samples(
                rows=self._reader.rows(indices[np.array(padded) - self._rows.start], allocate=self._allocate),
                num_real=len(mine),
                row_rng=partial(_row_rng, self._seed, step, padded),
            )
            batches.append(self._pinned(self._task.collate(samples)))
        return batches

    def _allocate(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = torch.empty(shape, dtype=torch.int64, pin_memory=self._pins).numpy()
        return found

    def _pinned(self, batch: Batch) -> Batch:
        """The batch where the GPU can copy it from by itself; token ids were read to there."""
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pins else batch


def _row_rng(seed: int, step: int, rows: list[int], row: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, rows[row]])
