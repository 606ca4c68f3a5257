"""Four ways to save one rank's state while it trains; each begins on the training thread and tells when it is done."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from orchestrator.checkpoint.catalog import find
from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.checkpoint.verify import verify
from orchestrator.store import Store, WorkerGroup
from workloads.engine import Engine

KEEP_ALL = 1000  # nobody deletes anything, so that no one's vacuuming falls into another's round


class Contender(Protocol):
    def begin(self, step: int) -> None:
        """What the training thread has to wait for."""

    def done(self) -> bool:
        """Whether this rank's part is in S3; with Headway's rank 0, whether the checkpoint is committed."""

    def check(self) -> None:
        """Outside of what is measured: that the save was whole."""

    def close(self) -> None: ...


class Headway:
    """:class:`CheckpointWriter`, as training uses it. Each save is read back and verified to the last byte."""

    def __init__(self, store: Store, group: WorkerGroup, engine: Engine, *, rank: int, world_size: int) -> None:
        self._store, self._group, self._engine, self._rank = store, group, engine, rank
        self._step = self._step_done = 0
        self._error: Exception | None = None
        self._writer = CheckpointWriter(
            store, group, engine.state, engine.model, rank=rank, world_size=world_size, keep=KEEP_ALL
        )

    def begin(self, step: int) -> None:
        self._step = step
        self._writer.save(State(step=step, precision="fp32", optimizer_step=self._engine.state.optimizer_step))

    def done(self) -> bool:
        for saved in self._writer.take_results():
            self._error, self._step_done = saved.error, saved.step
        return self._step_done == self._step

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._rank == 0:
            verify(self._store, find(self._store, self._group.run_id, self._step))

    def close(self) -> None:
        self._writer.close()


class DeepSpeedThenUpload:
    """``engine.save_checkpoint`` to a local folder of the rank's own, then Ray Train's upload of it, then its end.

    The upload is ``StorageContext.persist_current_checkpoint``, the very call that ``ray.train.report(checkpoint=…)``
    makes in the worker; it needs no session. As there, a rank goes on when all have reported.
    """

    def __init__(self, storage_path: str, scratch: Path, engine: Engine, *, rank: int) -> None:
        from ray.train.v2._internal.execution.storage import StorageContext

        self._storage = StorageContext(storage_path=storage_path, experiment_dir_name="deepspeed")
        self._scratch, self._engine = scratch / f"deepspeed-{rank}", engine

    def begin(self, step: int) -> None:
        from ray.train import Checkpoint

        self._engine.module.save_checkpoint(str(self._scratch), tag=f"step-{step}")
        self._storage.persist_current_checkpoint(Checkpoint.from_directory(str(self._scratch)), f"step-{step}")
        shutil.rmtree(self._scratch)
        dist.barrier()

    def done(self) -> bool:
        return True

    def check(self) -> None:
        """Both of its calls raise where they fail."""

    def close(self) -> None:
        """It holds nothing."""


class AsyncSave:
    """``torch.distributed.checkpoint.async_save`` in a process of its own, then Ray Train's upload on a thread.

    Staging goes into shared memory that is kept from save to save, pinned where there is CUDA; it is synchronous, since
    the optimizer's next step would change the tensors under it. The process is started by the first save. There is no
    storage writer for S3 without s3fs, so FileSystemWriter writes a local folder, and a thread uploads this rank's
    part of it once it is complete.
    """

    def __init__(
        self, storage_path: str, scratch: Path, tensors: dict[str, Tensor], *, rank: int, group: dist.ProcessGroup
    ) -> None:
        from ray.train.v2._internal.execution.storage import StorageContext
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = torch.cuda.is_available()
        self._storage = StorageContext(storage_path=storage_path, experiment_dir_name="async-save")
        self._scratch, self._rank, self._group = scratch, rank, group
        self._tensors = {f"{rank}/{name}": tensor for name, tensor in tensors.items()}
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="async-save-upload")
        self._uploaded: Future[None] | None = None

    def begin(self, step: int) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if self._uploaded is not None:
            self._uploaded.result()
        folder = self._scratch / f"async-save-{step}"
        written = async_save(
            self._tensors,
            storage_writer=FileSystemWriter(folder),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
            process_group=self._group,
        )
        self._uploaded = self._pool.submit(self._upload, written, folder)

    def _upload(self, written: Any, folder: Path) -> None:
        from ray.train import Checkpoint

        written.result()
        part = folder.with_name(f"{folder.name}-{self._rank}")
        part.mkdir()
        for file in folder.glob(f"__{self._rank}_*"):
            file.rename(part / file.name)
        if self._rank == 0:
            (folder / ".metadata").rename(part / ".metadata")
        self._storage.persist_current_checkpoint(Checkpoint.from_directory(str(part)), folder.name)
        shutil.rmtree(part)

    def done(self) -> bool:
        return self._uploaded is not None and self._uploaded.done()

    def check(self) -> None:
        if self._uploaded is not None:
            self._uploaded.result()

    def close(self) -> None:
        self._pool.shutdown()
        self._stager.close()


class Memcpy:
    """The limit: a copy of the state into buffers that are there already, and nothing else."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._pairs = [(torch.zeros_like(tensor), tensor) for tensor in tensors.values()]

    def begin(self, step: int) -> None:
        for buffer, tensor in self._pairs:
            buffer.copy_(tensor)

    def done(self) -> bool:
        return True

    def check(self) -> None:
        """There is nothing that could have gone wrong."""

    def close(self) -> None:
        self._pairs.clear()


def state_tensors(engine: Engine) -> dict[str, Tensor]:
    """Masters and moments that this rank owns: what all contenders save."""
    return {
        f"{kind}/{fragment.parameter}": tensor.detach()
        for fragment in engine.state.fragments()
        for kind, tensor in fragment.tensors.items()
    }
