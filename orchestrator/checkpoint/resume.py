"""Resuming: each rank reads just the bytes that its own partition needs, whatever wrote them.

Any ZeRO stage to any, any world size to any, with no conversion step: a fragment of the new partition is cut out
of the stored fragments that overlap it, 64 KiB block by block, each block checked before its bytes are used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.catalog import committed_steps, read_manifest
from orchestrator.checkpoint.format import (
    DIGEST_BYTES,
    KINDS,
    Manifest,
    RankFile,
    covering_blocks,
    num_blocks,
    overlaps,
    verify_blocks,
)
from orchestrator.checkpoint.tensors import persistent_buffers, safetensors_dtype
from orchestrator.checkpoint.zero import ZeroState
from orchestrator.errors import IntegrityError, NotFound, RunError
from orchestrator.store import Store, layout

logger = logging.getLogger(__name__)
READ_BYTES = 16 * 2**20
_READERS = 8
_NOTHING_COMMITTED, _NONE_USABLE = -1, -2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A byte range of one file and the 1-D tensor of bytes that it fills."""

    file: int
    start: int
    target: Tensor

    @property
    def stop(self) -> int:
        return self.start + int(self.target.numel())


class CheckpointReader:
    """Verified ranged reads of one committed checkpoint."""

    def __init__(self, store: Store, run_id: str, manifest: Manifest) -> None:
        self.manifest = manifest
        self._store = store
        self._folder = layout.checkpoint(run_id, manifest.state.step)
        self._indexes: dict[int, bytes] = {}
        self.bytes_read = 0

    def check_indexes(self) -> None:
        """Fetch every file's index and check it and the file's size.

        Raises:
            IntegrityError: naming the first bad part.
        """
        sizes = {item.key: item.size_bytes for item in self._store.list(self._folder)}
        for number, file in enumerate(self.manifest.files):
            self._index(number)
            found = sizes.get(self._folder + file.key)
            if found != file.size_bytes:
                raise IntegrityError(
                    f"{self._store.uri_of(self._folder + file.key)} holds {found} bytes, not {file.size_bytes}."
                )

    def read(self, pieces: list[Piece]) -> None:
        """Fill every piece's target, in parallel reads of at most 16 MiB.

        Raises:
            IntegrityError: a block does not match its digest.
        """
        groups = list(_coalesce(pieces))
        for number in {group[0].file for group in groups}:
            self._index(number)
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(self._read_group, groups):
                pass

    def check_all(self) -> None:
        """Read every byte and check it.

        Raises:
            IntegrityError, NotFound: naming the first bad part.
        """
        self.check_indexes()
        for number, file in enumerate(self.manifest.files):
            for start in range(0, file.size_bytes, READ_BYTES):
                part = torch.empty(min(READ_BYTES, file.size_bytes - start), dtype=torch.uint8)
                self.read([Piece(file=number, start=start, target=part)])

    def _read_group(self, group: list[Piece]) -> None:
        file = self.manifest.files[group[0].file]
        start, stop = group[0].start, max(piece.stop for piece in group)
        blocks = covering_blocks(start, stop - start, file.size_bytes)
        key = self._folder + file.key
        data = self._store.get_range(key, blocks.start, blocks.stop - blocks.start)
        if len(data) != blocks.stop - blocks.start:
            raise IntegrityError(f"{self._store.uri_of(key)} ends at byte {blocks.start + len(data)}.")
        self.bytes_read += len(data)
        verify_blocks(data, blocks.first, self._index(group[0].file), source=self._store.uri_of(key))
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for piece in group:
            offset = piece.start - blocks.start
            piece.target.copy_(source[offset : offset + piece.target.numel()])

    def _index(self, number: int) -> bytes:
        if number not in self._indexes:
            file: RankFile = self.manifest.files[number]
            self._indexes[number] = self._store.get_verified(
                self._folder + file.index_key,
                sha256=file.index_sha256,
                size_bytes=num_blocks(file.size_bytes) * DIGEST_BYTES,
            )
        return self._indexes[number]


def load_state(reader: CheckpointReader, state: ZeroState, module: nn.Module) -> None:
    """Fill this rank's masters, moments and buffers from a checkpoint; :meth:`ZeroState.refresh` comes after.

    Raises:
        RunError: the model has other parameters than the checkpoint. IntegrityError: damaged bytes.
    """
    manifest = reader.manifest
    require_same_parameters(manifest, state.shapes)
    pieces, copies = [], []
    for fragment in state.fragments():
        for kind in KINDS:
            target = fragment.tensors[kind]
            host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            pieces += list(pieces_of(manifest, fragment.parameter, kind, fragment.start, host))
            if host is not target:
                copies.append((target, host))
    for name, tensor in persistent_buffers(module).items():
        pieces.append(_buffer_piece(manifest, name, tensor))
    reader.read(pieces)
    for target, host in copies:
        target.copy_(host)
    state.optimizer_step = manifest.state.optimizer_step


def pieces_of(manifest: Manifest, name: str, kind: str, start: int, target: Tensor) -> Iterator[Piece]:
    """The byte ranges that fill ``target`` (1-D fp32) with a parameter's elements from ``start`` on."""
    target_bytes = target.view(torch.uint8)
    for stored, skip, length in overlaps(manifest.parameters[name], start, target.numel()):
        into = 4 * (stored.start + skip - start)
        yield Piece(
            file=stored.file,
            start=stored.offsets[kind] + 4 * skip,  # type: ignore[index]
            target=target_bytes[into : into + 4 * length],
        )


def require_same_parameters(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(parameter.shape) for name, parameter in manifest.parameters.items()}
    if stored == shapes:
        return
    for name in sorted(stored.keys() | shapes.keys()):
        if stored.get(name) != shapes.get(name):
            raise RunError(
                f"The checkpoint of step {manifest.state.step} holds {name} as {stored.get(name)}, "
                f"the model has it as {shapes.get(name)}."
            )


def _buffer_piece(manifest: Manifest, name: str, tensor: Tensor) -> Piece:
    stored = manifest.buffers.get(name)
    if stored is None or tuple(stored.shape) != tuple(tensor.shape) or stored.dtype != safetensors_dtype(tensor.dtype):
        raise RunError(f"The checkpoint of step {manifest.state.step} has no matching buffer {name}.")
    return Piece(file=stored.file, start=stored.offset, target=tensor.detach().view(-1).view(torch.uint8))


def _coalesce(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one file that lie close together, as reads of at most READ_BYTES."""
    split = []
    for piece in pieces:
        for offset in range(0, piece.target.numel(), READ_BYTES):
            part = piece.target[offset : offset + READ_BYTES]
            split.append(Piece(file=piece.file, start=piece.start + offset, target=part))
    group: list[Piece] = []
    for piece in sorted(split, key=lambda p: (p.file, p.start)):
        if group and (
            piece.file != group[0].file
            or piece.stop - group[0].start > READ_BYTES
            or piece.start > group[-1].stop + READ_BYTES // 256
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def resume_newest(store: Store, run_id: str, state: ZeroState, module: nn.Module, *, rank: int) -> Manifest | None:
    """Load the newest committed checkpoint that verifies, else the one before it. Collective.

    Rank 0 chooses and tells the others the step and the manifest's digest; all ranks agree on whether the load
    succeeded. Returns None where nothing is committed.

    Raises:
        IntegrityError: there are checkpoints, and none of them can be used.
    """
    below = 2**62
    while True:
        step, digest = _choose(store, run_id, below, rank=rank)
        if step == _NOTHING_COMMITTED:
            return None
        if step == _NONE_USABLE:
            # Not a fresh start: the state may be half filled, and its saves would meet the damaged ones' names.
            raise IntegrityError(
                f"None of the checkpoints committed for {run_id} can be used; the warnings say what is damaged.",
                next_step=f"Restore {store.uri_of(layout.checkpoints(run_id))}, or delete it to train from the start.",
            )
        loaded, fault = None, ""
        try:
            loaded, found = read_manifest(store, run_id, step)
            if found != digest:
                raise IntegrityError(f"The manifest of step {step} is not the one that rank 0 read.")
            reader = CheckpointReader(store, run_id, loaded)
            load_state(reader, state, module)
        except (IntegrityError, NotFound) as e:
            fault = str(e)
        if _all_ranks(not fault):
            state.refresh()  # collective, so not before it is known that every rank has read its part
            return loaded
        logger.warning(
            "The checkpoint of step %d cannot be used, trying the one before: %s",
            step,
            fault or "(other rank)",
        )
        below = step


def _choose(store: Store, run_id: str, below: int, *, rank: int) -> tuple[int, str]:
    """Rank 0's choice, told to all: (step, SHA-256 of its manifest), or one of the two negative numbers."""
    message = torch.zeros(1 + DIGEST_BYTES, dtype=torch.int64)
    if rank == 0:
        committed = committed_steps(store, run_id)
        message[0] = _NONE_USABLE if committed else _NOTHING_COMMITTED
        for step in committed:
            if step >= below:
                continue
            try:
                manifest, digest = read_manifest(store, run_id, step)
                CheckpointReader(store, run_id, manifest).check_indexes()
            except (IntegrityError, NotFound) as e:
                logger.warning("The checkpoint of step %d cannot be used, trying the one before: %s", step, e)
                continue
            message[0] = step
            message[1:] = torch.frombuffer(bytearray(bytes.fromhex(digest)), dtype=torch.uint8).long()
            break
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(message, src=0)
    return int(message[0]), bytes(message[1:].tolist()).hex()


def _all_ranks(ok: bool) -> bool:
    agreed = torch.tensor([int(ok)])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    return bool(agreed.item())
