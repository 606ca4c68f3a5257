"""Saving: a snapshot into host memory, then hashing, upload and commit behind training.

Each rank lays its fragments out as one safetensors file in a buffer that every save reuses, and hands it to a
thread. The thread uploads the file and its index, then publishes what it wrote as one small object. Rank 0 polls
for those and commits the manifest: no collectives, so a slow upload never meets the training thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.catalog import read_manifest
from orchestrator.checkpoint.format import (
    KINDS,
    Buffer,
    Fragment,
    Manifest,
    Parameter,
    RankFile,
    State,
    block_index,
)
from orchestrator.checkpoint.resume import CheckpointReader
from orchestrator.checkpoint.tensors import persistent_buffers, safetensors_dtype
from orchestrator.checkpoint.zero import OwnedFragment, ZeroState
from orchestrator.errors import AlreadyExists, HeadwayError, IntegrityError, NotFound, StoreError
from orchestrator.spec import canonical_json
from orchestrator.store import Attempt, Store, layout
from orchestrator.store.attempts import ensure_newest

logger = logging.getLogger(__name__)
COMMIT_TIMEOUT_S = 600.0
_POLL_S = 0.1
_FLOAT_BYTES = 4


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
    last_committed_step: int | None = None
    results: list[Saved] = field(default_factory=list)


class CheckpointWriter:
    """Saves the state of one rank's engine. All ranks call :meth:`save` at the same steps.

    Args:
        group_nonce: drawn anew by rank 0 whenever the group of workers starts, and the same on all ranks, so that
            a restarted group never mixes its files with those of the one before.
        keep: committed checkpoints to keep, newest first.
    """

    def __init__(
        self,
        store: Store,
        attempt: Attempt,
        state: ZeroState,
        module: nn.Module,
        *,
        rank: int,
        world_size: int,
        group_nonce: str,
        keep: int,
    ) -> None:
        self.counts = SaveCounts()
        self._store, self._attempt, self._state = store, attempt, state
        self._rank, self._world_size, self._keep = rank, world_size, keep
        self._group = f"{layout.number(attempt.number)}-{group_nonce}"
        self._image = _FileImage(
            _share(state.fragments(), state, rank=rank, world_size=world_size),
            persistent_buffers(module) if rank == 0 else {},
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._last: Saved | None = None

    def save(self, scalars: State) -> None:
        """Snapshot now, upload behind. Returns once the state may change; waits for the save before, if any."""
        started = time.perf_counter()
        self.wait()
        self._image.snapshot()
        self._pending = self._pool.submit(self._write, scalars)
        self.counts.blocked_s += time.perf_counter() - started

    def wait(self) -> Saved | None:
        """Wait for the save under way, if any, and tell what became of the last one; None before the first.

        A save that failed is logged and counted and its :class:`Saved` says why; training goes on, and the next
        save tries again.
        """
        if self._pending is None:
            return self._last
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

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    # -- on the thread

    def _write(self, scalars: State) -> Saved:
        started = time.perf_counter()
        size_bytes = self._image.size_bytes
        folder = layout.checkpoint(self._attempt.run_id, scalars.step)
        try:
            self._upload(folder)
            if self._rank == 0:
                self._commit(folder, scalars)
                remove_old(self._store, self._attempt, keep=self._keep, just_committed=scalars.step)
        except HeadwayError as e:
            self._tell_failed(folder, e)
            return Saved(step=scalars.step, seconds=time.perf_counter() - started, size_bytes=size_bytes, error=e)
        return Saved(step=scalars.step, seconds=time.perf_counter() - started, size_bytes=size_bytes)

    def _upload(self, folder: str) -> None:
        name = self._rank_name(self._rank)
        data = self._image.file_bytes()
        index = block_index(data)
        self._store.upload(f"{folder}{name}.safetensors", bytes(data))
        self._store.upload(f"{folder}{name}.index", index)
        file = RankFile(
            key=f"{name}.safetensors",
            size_bytes=len(data),
            index_key=f"{name}.index",
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        published = {"file": file.model_dump(mode="json"), **self._image.describe()}
        self._store.create_json(f"{folder}{name}.json", published)

    def _tell_failed(self, folder: str, error: HeadwayError) -> None:
        """Let rank 0 know, so that it does not wait for this rank in vain."""
        if self._rank == 0:
            return
        try:
            self._store.create_json(f"{folder}{self._rank_name(self._rank)}.failed.json", {"error": str(error)})
        except HeadwayError as e:
            logger.warning("That rank %d's upload failed could not be told: %s", self._rank, e)

    def _rank_name(self, rank: int) -> str:
        return f"{self._group}/rank-{rank:05d}"

    def _commit(self, folder: str, scalars: State) -> None:
        published = self._await_ranks(folder)
        manifest = assemble(
            published,
            shapes=self._state.shapes,
            attempt=self._attempt,
            nonce=self._group.split("-")[1],
            scalars=scalars,
        )
        ensure_newest(self._store, self._attempt)
        key, data = f"{folder}manifest.json", canonical_json(manifest.model_dump(mode="json"))
        try:
            self._store.create(key, data)
        except AlreadyExists:
            if self._standing_is_whole(scalars.step):
                logger.info("Step %d was committed before.", scalars.step)
                return
            # Without this a run whose last step is damaged could never end: each attempt would stop at its name.
            ensure_newest(self._store, self._attempt)
            self._store.delete([key])
            self._store.create(key, data)

    def _standing_is_whole(self, step: int) -> bool:
        """Whether a checkpoint committed before verifies to the last byte: then it is as good, and stays."""
        try:
            standing, _ = read_manifest(self._store, self._attempt.run_id, step)
            CheckpointReader(self._store, self._attempt.run_id, standing).check_all()
        except (IntegrityError, NotFound) as e:
            logger.warning("The checkpoint of step %d is damaged and gives way to a new one: %s", step, e)
            return False
        return True

    def _await_ranks(self, folder: str) -> list[dict[str, Any]]:
        """What each rank published, in rank order.

        Raises:
            StoreError: some ranks failed, or did not finish in time; it names them.
        """
        wanted = {f"{folder}{self._rank_name(rank)}.json": rank for rank in range(self._world_size)}
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while True:
            there = {item.key for item in self._store.list(f"{folder}{self._group}/")}
            missing = [rank for key, rank in wanted.items() if key not in there]
            if not missing:
                return [self._store.get_json(key) for key in wanted]
            failed = [rank for rank in missing if f"{folder}{self._rank_name(rank)}.failed.json" in there]
            if failed:
                raise StoreError(
                    f"{self._store.uri_of(folder)}: ranks {failed} could not upload their part; "
                    "the checkpoint is not committed."
                )
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self._store.uri_of(folder)}: ranks {missing} did not finish uploading "
                    f"within {COMMIT_TIMEOUT_S:.0f} s; the checkpoint is not committed."
                )
            time.sleep(_POLL_S)


class _FileImage:
    """A safetensors file in host memory whose layout never changes between saves."""

    def __init__(self, fragments: list[OwnedFragment], buffers: dict[str, Tensor]) -> None:
        self._fragments = fragments
        tensors = [
            *((f"{kind}/{f.parameter}", f.tensors[kind]) for f in fragments for kind in KINDS),
            *((f"buffer/{name}", tensor) for name, tensor in buffers.items()),
        ]
        # Wide elements first, as safetensors itself does, so that each tensor is aligned to its own.
        self._tensors = sorted(tensors, key=lambda item: -item[1].element_size())
        header, self._offsets, self._shapes = {}, {}, {}
        position = 0
        for name, tensor in self._tensors:
            size = tensor.numel() * tensor.element_size()
            dtype, shape = safetensors_dtype(tensor.dtype), list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            self._shapes[name] = (dtype, shape, size)
            self._offsets[name] = position
            position += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self.size_bytes = self._data_start + position
        self._bytes = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        head = struct.pack("<Q", len(encoded)) + encoded
        self._bytes[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)

    def snapshot(self) -> None:
        """Copy every tensor's present value into the buffer."""
        for name, tensor in self._tensors:
            start = self._data_start + self._offsets[name]
            size = tensor.numel() * tensor.element_size()
            if size:
                target = self._bytes[start : start + size].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def file_bytes(self) -> memoryview:
        return memoryview(self._bytes.numpy())

    def describe(self) -> dict[str, Any]:
        """Where each fragment and buffer lies in the file, for the manifest."""
        return {
            "fragments": [
                {
                    "parameter": f.parameter,
                    "start": f.start,
                    "length": f.length,
                    "offsets": {k: self._data_start + self._offsets[f"{k}/{f.parameter}"] for k in KINDS},
                }
                for f in self._fragments
            ],
            "buffers": {
                name.removeprefix("buffer/"): {
                    "dtype": dtype,
                    "shape": shape,
                    "size_bytes": size,
                    "offset": self._data_start + self._offsets[name],
                }
                for name, (dtype, shape, size) in self._shapes.items()
                if name.startswith("buffer/")
            },
        }


def assemble(
    published: list[dict[str, Any]],
    *,
    shapes: dict[str, tuple[int, ...]],
    attempt: Attempt,
    nonce: str,
    scalars: State,
) -> Manifest:
    """The manifest of what all ranks published, checked for holes. Pure but for the time that it carries."""
    fragments: dict[str, list[Fragment]] = {name: [] for name in shapes}
    buffers: dict[str, Buffer] = {}
    for rank, part in enumerate(published):
        for f in part["fragments"]:
            fragments[f["parameter"]].append(
                Fragment(file=rank, start=f["start"], length=f["length"], offsets=f["offsets"])
            )
        for name, b in part["buffers"].items():
            buffers[name] = Buffer(file=rank, **b)
    return Manifest(
        run_id=attempt.run_id,
        attempt=attempt.number,
        nonce=nonce,
        world_size=len(published),
        created_s=time.time(),
        state=scalars,
        files=tuple(RankFile.model_validate(part["file"]) for part in published),
        parameters={
            name: Parameter(shape=shapes[name], fragments=tuple(sorted(found, key=lambda f: f.start)))
            for name, found in fragments.items()
        },
        buffers=buffers,
    )


def remove_old(store: Store, attempt: Attempt, *, keep: int, just_committed: int) -> None:
    """Keep the ``keep`` newest committed checkpoints of the run, and the one just committed.

    What goes: older committed ones (manifest first, so that none is ever half there), and what this attempt and
    earlier ones left uncommitted before the step just committed. What newer attempts write is left alone, and so is
    what comes after that step: other ranks may be at the next save already.
    """
    root = layout.checkpoints(attempt.run_id)
    by_step: dict[int, list[str]] = {}
    for item in store.list(root):
        name = item.key.removeprefix(root).split("/", 1)[0]
        if name.startswith("step-") and name[5:].isdigit():
            by_step.setdefault(int(name[5:]), []).append(item.key)
    manifests = {step for step, keys in by_step.items() if layout.checkpoint_manifest(attempt.run_id, step) in keys}
    kept = {*sorted(manifests)[-keep:], just_committed}
    for step, keys in by_step.items():
        if step in kept or step > just_committed:
            continue
        if step in manifests:
            store.delete([layout.checkpoint_manifest(attempt.run_id, step)])
        store.delete(key for key in keys if not _is_newer(key, attempt))


def _is_newer(key: str, attempt: Attempt) -> bool:
    """Whether a newer attempt wrote this object, by the folder ``<attempt>-<nonce>/`` that it lies in."""
    number = key.rsplit("/", 2)[-2].split("-")[0]
    return number.isdigit() and int(number) > attempt.number


def _share(fragments: list[OwnedFragment], state: ZeroState, *, rank: int, world_size: int) -> list[OwnedFragment]:
    """What this rank writes. Where every rank holds everything, each writes an equal run of every parameter."""
    if not state.is_replicated:
        return fragments
    shared = []
    for f in fragments:
        size = -(-f.length // world_size)
        start = min(rank * size, f.length)
        length = min(size, f.length - start)
        if length > 0:
            tensors = {kind: tensor.narrow(0, start, length) for kind, tensor in f.tensors.items()}
            shared.append(OwnedFragment(parameter=f.parameter, start=start, length=length, tensors=tensors))
    return shared
