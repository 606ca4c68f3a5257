"""A prepared dataset as a ``torch.utils.data.IterableDataset``, for anyone's training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from orchestrator.dataset.ahead import ReadAhead
from orchestrator.dataset.format import DatasetManifest, find_dataset
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.dataset.rows import Rows
from orchestrator.errors import UsageError
from orchestrator.store.s3 import Store, open_store

STATE_FORMAT = "headway/data-state/1"
_SPLITS = ("train", "eval")
_WORKS_S = 0.005  # between two batches: a caller who takes longer does something with them


class TokenDataset(IterableDataset[dict[str, torch.Tensor]]):  # type: ignore[misc, unused-ignore]
    """This rank's rows of each global batch, as ``{"tokens": int64 (rows, sequence_length + 1), …}``.

    It reads ahead on threads of its own. ``DataLoader(dataset, batch_size=None)`` takes it as it is, and with
    ``num_workers`` too, which are dealt the steps. The global batch of a step is the same at any number of ranks and
    workers, so the state is the step, and may be loaded at another world size::

        dataset = TokenDataset("corpus", sequence_length=2048, batch_size=256)
        for batch in dataset:
            loss = model(batch["tokens"])
            state = dataset.state_dict()

    Where the batch does not divide by the ranks, the first ones have a row more.

    Args:
        dataset: ``NAME`` (its newest preparation) or ``NAME@FINGERPRINT``.
        store: ``s3://bucket/prefix``, or a store that is open; None is ``HEADWAY_STORE``.
        batch_size: rows of the global batch, over all ranks.
        rank, world_size: None are those of ``torch.distributed`` where it is initialised, else one rank alone.
        num_steps: where it ends; None for never. Epochs follow each other, each in another order.
        cache: the folder of pieces on this node; None is ``HEADWAY_CACHE``, else ``~/.cache/headway``.
        pin_memory: token ids are read straight into pinned memory, ready for a copy to the GPU.

    Raises:
        UsageError, SpecError: arguments that make no sense, or no such dataset. RunError: fewer samples than a batch.
        IntegrityError: a manifest of another version. StoreError: the store cannot be reached.
    """

    def __init__(
        self,
        dataset: str,
        *,
        store: str | Store | None = None,
        split: str = "train",
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_steps: int | None = None,
        cache: Path | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        if split not in _SPLITS:
            raise UsageError(f"split: {split!r} is none of {', '.join(_SPLITS)}.")
        if sequence_length < 1 or batch_size < 1:
            raise UsageError(f"sequence_length {sequence_length} and batch_size {batch_size} must be at least 1.")
        self.rank, self.world_size = _place(rank, world_size)
        if batch_size < self.world_size:
            raise UsageError(f"batch_size {batch_size} is less than a row for each of {self.world_size} ranks.")
        self._store = store if isinstance(store, Store) else open_store(store)
        self._cache = None if cache is None else Path(cache)
        manifest = find_dataset(self._store, dataset)
        self._manifest = manifest.model_dump_json()
        self.dataset = f"{manifest.name}@{manifest.fingerprint}"
        self.sequence_length, self.batch_size, self.seed, self.split = sequence_length, batch_size, seed, split
        self.num_steps, self.pin_memory = num_steps, pin_memory
        self._step = 0
        require_samples(self._reader(manifest), at_least=batch_size, what=split)

    @property
    def rows(self) -> range:
        """This rank's rows of each global batch."""
        share, more = divmod(self.batch_size, self.world_size)
        start = self.rank * share + min(self.rank, more)
        return range(start, start + share + (self.rank < more))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        manifest = DatasetManifest.model_validate_json(self._manifest)
        worker = get_worker_info()
        every, first = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        reader = self._reader(manifest)
        order = SampleOrder(
            fingerprint=manifest.fingerprint,
            seed=self.seed,
            num_samples=reader.num_samples,
            global_batch_size=self.batch_size,
            sequence_length=self.sequence_length,
        )
        ahead = ReadAhead(reader, order, self.rows, num_steps=self.num_steps, every=every)
        # A worker's own state counts its own steps, and a loader that keeps it (torchdata's) loads it into the worker.
        step = self._step + (first - self._step) % every if worker is not None else self._step
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        following: Future[Rows] | None = None
        works = False

        def build(step: int) -> Rows:
            return reader.rows(ahead.take(step), allocate=self._allocate)

        try:
            while self.num_steps is None or step < self.num_steps:
                rows = build(step) if following is None else following.result()
                step += every
                self._step = step
                has_more = self.num_steps is None or step < self.num_steps
                # On a thread where the caller works between batches; for one that only takes them, the handing over of
                # Python's lock would cost more than a batch does.
                following = pool.submit(build, step) if works and has_more else None
                given_s = time.perf_counter()
                yield {name: torch.from_numpy(array) for name, array in rows.items()}
                works = time.perf_counter() - given_s > _WORKS_S
        finally:
            pool.shutdown(cancel_futures=True)
            reader.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration goes on: behind the last batch that this process was given.

        Behind a ``DataLoader`` with workers that is not known here: it asks for batches ahead of their use. Then count
        the steps, and load ``{**state, "step": steps}``.
        """
        return {"format": STATE_FORMAT, "step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of any rank at any world size, from the next iteration on.

        Raises:
            UsageError: it is no such state, or of other data, another batch or another order.
        """
        if state.get("format") != STATE_FORMAT:
            raise UsageError(
                f"This is no state of a TokenDataset: format {state.get('format')!r}, not {STATE_FORMAT!r}."
            )
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UsageError(
                    f"The state is of {name} {state.get(name)!r}, and this dataset has {mine!r}.",
                    next_step="Open the dataset with the arguments that the state was made with.",
                )
        self._step = int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned, which opens the store by its address."""
        return {**self.__dict__, "_store": self._store.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_store": open_store(state["_store"])})

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def _reader(self, manifest: DatasetManifest) -> TokenReader:
        split = manifest.train if self.split == "train" else manifest.eval
        return TokenReader(self._store, manifest, split, sequence_length=self.sequence_length, cache=self._cache)

    def _allocate(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory).numpy()
        return found


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise UsageError(f"rank {rank} and world_size {world_size}: give both, or none.")
    if rank is None or world_size is None:
        together = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is not in 0 … {world_size - 1}.")
    return rank, world_size
