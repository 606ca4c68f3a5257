"""Saving: a snapshot into host memory, then hashing, upload and commit behind training.

Each rank lays its fragments out as one safetensors file in a buffer that every save reuses, and hands it to a
thread. The thread uploads the file and its index, then publishes what it wrote as one small object. Rank 0 polls
for those and commits the manifest: no collectives, so a slow upload never meets the training thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.base import Origin
from orchestrator.checkpoint.catalog import MANIFEST, Folder
from orchestrator.checkpoint.commit import COMMIT_TIMEOUT_S, assemble, await_ranks, rank_name
from orchestrator.checkpoint.format import RankFile, State, block_index, seal
from orchestrator.checkpoint.image import FileImage, share
from orchestrator.checkpoint.random_state import RandomState
from orchestrator.checkpoint.retention import abort_unfinished_uploads, retire
from orchestrator.checkpoint.tensors import persistent_buffers
from orchestrator.checkpoint.zero import OwnedFragment, ZeroState
from orchestrator.errors import AttemptFailed, Fenced, HeadwayError, UsageError
from orchestrator.store import Store, WorkerGroup
from orchestrator.store.attempts import ensure_newest_group
from orchestrator.store.s3 import PART_BYTES

logger = logging.getLogger(__name__)
UPLOAD_TRIES = 3
"""Whole uploads tried, each of requests that the store tries several times by itself."""
RETRY_S = 5.0
_PIECE_BYTES = 2**20  # copied at a time, while training cannot have the interpreter
_LOWEST_PRIORITY = 19
CALM_BYTES_PER_S = 6 * 2**20
"""How fast a rank uploads where training itself computes on the CPUs: so fast that two ranks take about a tenth of two
cores, an S3 server on them included. Faster where half the time between two saves would not do."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What became of one save on this rank. Rank 0's tells whether the checkpoint is committed."""

    step: int
    seconds: float
    size_bytes: int
    error: HeadwayError | None = None


@dataclass(kw_only=True)
class SaveCounts:
    committed: int = 0
    failed: int = 0
    blocked_s: float = 0.0
    """Time that the training thread spent in saves."""
    last_committed_step: int | None = None
    results: list[Saved] = field(default_factory=list)


class CheckpointWriter:
    """Saves the state of one rank's engine. All ranks call :meth:`save` at the same steps.

    Args:
        group: this start of the group of workers, claimed by rank 0 and the same on all ranks, so that a restarted
            group never mixes its files with those of the one before.
        origin: where frozen parameters come from that a save need not write.
        keep: steps whose checkpoints to keep, newest first.
        random: generators whose state to save, for loops that draw from them.
        retry_s: wait before an upload that failed is tried again.
        before_commit: called by rank 0 behind training, once all files of a checkpoint are there; it may not raise.
    """

    def __init__(
        self,
        store: Store,
        group: WorkerGroup,
        state: ZeroState,
        module: nn.Module,
        *,
        rank: int,
        world_size: int,
        keep: int,
        origin: Origin | None = None,
        random: RandomState | None = None,
        retry_s: float = RETRY_S,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts = SaveCounts()
        self._store, self._group, self._state = store, group, state
        self._rank, self._world_size, self._keep = rank, world_size, keep
        self._random, self._retry_s, self._before_commit = random, retry_s, before_commit
        self._module, self._origin = module, origin
        self._image = FileImage(*_parts(state, origin, rank=rank, world_size=world_size), self._whole())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_run_behind)
        self._pending: Future[Saved] | None = None
        self._last: Saved | None = None
        self._newest_step: int | None = None
        self._closing, self._hurry, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._saved_s = time.monotonic()
        self._spread_s = 0.0

    def save(self, scalars: State, *, urgent: bool = False) -> None:
        """Snapshot now, upload behind. Returns once the state may change; waits for the save before, if any.

        Args:
            urgent: upload as fast as can be, whatever that takes from training.

        Raises:
            UsageError: the step is not above that of the save before. Its files would be those of that checkpoint.
        """
        started = time.perf_counter()
        self.wait()
        if self._newest_step is not None and scalars.step <= self._newest_step:
            raise UsageError(f"Step {scalars.step} is not above step {self._newest_step}, which was saved before it.")
        self._newest_step = scalars.step
        if self._random is not None:
            self._random.capture()
        self._image.snapshot(self._whole())
        self._pace(urgent=urgent)
        self._pending = self._pool.submit(self._write, scalars)
        self.counts.blocked_s += time.perf_counter() - started

    def wait(self) -> Saved | None:
        """Wait for the save under way, if any, and tell what became of the last one; None before the first.

        A save that failed is logged and counted and its :class:`Saved` says why; training goes on, and the next
        save tries again.
        """
        if self._pending is None:
            return self._last
        self._hurry.set()
        saved = self._last = self._pending.result()
        self._pending = None
        self.counts.results.append(saved)
        if saved.error is None:
            self.counts.committed += 1
            self.counts.last_committed_step = saved.step
            return saved
        self.counts.failed += 1
        logger.warning("The checkpoint of step %d was not saved, training goes on: %s", saved.step, saved.error)
        return saved

    def take_results(self) -> list[Saved]:
        """Finished saves since the last call, without waiting; for the run's record."""
        if self._pending is not None and self._pending.done():
            self.wait()
        results, self.counts.results = self.counts.results, []
        return results

    def close(self, *, abandon: bool = False) -> None:
        """End the thread, once the save under way is through; one that keeps failing is not tried again.

        Args:
            abandon: wait some seconds at most for other ranks: an error is on its way out, their parts may never come.
        """
        self._closing.set()
        self._hurry.set()
        if abandon:
            self._abandoned.set()
        self._pool.shutdown(wait=True)

    def _whole(self) -> dict[str, Tensor]:
        """Tensors that are written as they are. Looked up each time: a module may put another in a buffer's place."""
        whole = {}
        if self._random is not None:
            whole = {f"random/{self._rank}/{name}": tensor for name, tensor in self._random.tensors.items()}
        if self._rank == 0:
            whole |= {f"buffer/{name}": tensor for name, tensor in persistent_buffers(self._module).items()}
        return whole

    def _pace(self, *, urgent: bool) -> None:
        """How far to spread the coming upload. Beside a GPU the CPUs have time: the sooner it is safe the better."""
        now_s = time.monotonic()
        interval_s, self._saved_s = now_s - self._saved_s, now_s
        at_once = urgent or torch.cuda.is_available() or self._image.size_bytes <= PART_BYTES  # one request anyway
        self._spread_s = 0.0 if at_once else min(self._image.size_bytes / CALM_BYTES_PER_S, interval_s / 2)
        self._hurry.clear()

    # -- on the thread

    def _write(self, scalars: State) -> Saved:
        started = time.perf_counter()
        folder = _folder(self._group, scalars.step)
        error: HeadwayError | None = None
        try:
            self._upload(folder)
            if self._rank == 0:
                self._commit(folder, scalars)
        except HeadwayError as e:
            error = e
        except Exception as e:  # a full disk, no memory: whatever it is, training must not end of it
            logger.exception("Saving step %d", scalars.step)
            error = AttemptFailed(f"Saving step {scalars.step} failed with {type(e).__name__}: {e}.")
        if error is not None:
            self._tell_failed(folder, error)
        seconds = time.perf_counter() - started
        return Saved(step=scalars.step, seconds=seconds, size_bytes=self._image.size_bytes, error=error)

    def _upload(self, folder: Folder) -> None:
        """Upload this rank's part and publish it, more than once if need be.

        Each try goes on where the one before failed. What came before is not written again: where only the answer to
        the last step was lost, rank 0 may have committed it by now.

        Raises:
            HeadwayError: the last try's.
        """
        steps = self._upload_steps(folder)
        for tries_left in reversed(range(UPLOAD_TRIES)):
            try:
                while steps:
                    steps[0]()
                    del steps[0]
                return
            except Fenced:
                raise
            except HeadwayError as e:
                if not tries_left or self._closing.wait(self._retry_s):
                    raise
                logger.warning("Uploading rank %d's part of step %d again: %s", self._rank, folder.step, e)
                self._hurry.set()

    def _upload_steps(self, folder: Folder) -> list[Callable[[], None]]:
        """Uploads of the file and of its index, and last what tells rank 0 that both are there."""
        name, index = rank_name(self._rank), block_index(self._image.data)
        file = RankFile(
            key=f"{name}.safetensors",
            size_bytes=self._image.size_bytes,
            index_key=f"{name}.index",
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        published = {"file": file.model_dump(mode="json"), **self._image.describe()}
        return [
            lambda: self._send(folder.prefix + file.key),
            lambda: self._store.upload(folder.prefix + file.index_key, index, once=True),
            lambda: self._store.create(f"{folder.prefix}{name}.json", seal(published)),
        ]

    def _send(self, key: str) -> None:
        """Send the file as a stream: each part goes out in one call that holds no lock of Python's. As a file, it
        would go in pieces of 16 KiB, and training would wait for the interpreter thousands of times."""
        pieces = paced(_pieces(self._image.data), over_s=self._spread_s, total=len(self._image.data), hurry=self._hurry)
        self._store.upload_stream(key, pieces, once=True, size_bytes=len(self._image.data))

    def _tell_failed(self, folder: Folder, error: HeadwayError) -> None:
        """Let rank 0 know, so that it does not wait for this rank in vain."""
        if self._rank == 0:
            return
        try:
            self._store.create_json(f"{folder.prefix}{rank_name(self._rank)}.failed.json", {"error": str(error)})
        except Exception as e:  # what made the save fail, no memory say, may well be so still
            logger.warning("That rank %d's upload failed could not be told: %s", self._rank, e)

    def _commit(self, folder: Folder, scalars: State) -> None:
        published = await_ranks(
            self._store,
            folder,
            world_size=self._world_size,
            timeout_s=COMMIT_TIMEOUT_S + self._spread_s,
            abandoned=self._abandoned,
        )
        manifest = assemble(
            published,
            folder=folder,
            shapes=self._state.shapes,
            frozen_shapes=self._state.frozen_shapes,
            origin=self._origin,
            scalars=scalars,
            created_s=time.time(),
        )
        self._before_commit()
        ensure_newest_group(self._store, self._group)
        self._store.create(folder.prefix + MANIFEST, seal(manifest.document()))
        try:
            if not self.counts.committed:
                abort_unfinished_uploads(self._store, self._group)
            retire(self._store, self._group, keep=self._keep, just_committed=folder)
        except Exception as e:  # whatever it is, the checkpoint is committed
            logger.warning("Step %d is committed, but what it makes superfluous was not deleted: %s", folder.step, e)


@contextlib.contextmanager
def writing(writer: CheckpointWriter) -> Iterator[CheckpointWriter]:
    """Close the writer at the end; where an error is on its way out, without waiting for ranks that may be gone."""
    try:
        yield writer
    except BaseException:
        writer.close(abandon=True)
        raise
    writer.close()


def _parts(
    state: ZeroState, origin: Origin | None, *, rank: int, world_size: int
) -> tuple[list[OwnedFragment], list[OwnedFragment]]:
    """What this rank writes, trained and frozen: its partition, or an equal share of what every rank holds. What the
    pretrained weights hold already is left out."""
    fragments, frozen = state.fragments(), state.frozen()
    if origin is not None:
        frozen = [f for f in frozen if f.parameter not in origin.tensors]
    if state.is_replicated:
        fragments = share(fragments, rank=rank, world_size=world_size)
    if state.frozen_is_replicated:
        frozen = share(frozen, rank=rank, world_size=world_size)
    return fragments, frozen


def _folder(group: WorkerGroup, step: int) -> Folder:
    return Folder(run_id=group.run_id, step=step, attempt=group.attempt.number, group=group.number, nonce=group.nonce)


def paced(pieces: Iterable[memoryview], *, over_s: float, total: int, hurry: threading.Event) -> Iterator[memoryview]:
    """Pieces of ``total`` bytes, evenly over ``over_s`` seconds; at once from the moment that ``hurry`` is set."""
    started, sent = time.monotonic(), 0
    for piece in pieces:
        hurry.wait(max(0.0, over_s * sent / total - (time.monotonic() - started)))
        yield piece
        sent += len(piece)


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


def _run_behind() -> None:
    """Let this thread, and those that it starts, take only the time that training leaves. Linux, thread by thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
