"""Resuming: each rank reads just the bytes that its own partition needs, whatever wrote them.

Any ZeRO stage to any, any world size to any, with no conversion step: a fragment of the new partition is cut out
of the stored fragments that overlap it, 64 KiB block by block, each block checked before its bytes are used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.adapter import plain_name
from orchestrator.checkpoint.agreement import all_agree, tell_all
from orchestrator.checkpoint.base import BaseUnusable, Origin, open_base, read_pieces
from orchestrator.checkpoint.catalog import Folder, committed, find, read_manifest
from orchestrator.checkpoint.format import KINDS, Buffer, Manifest
from orchestrator.checkpoint.random_state import RandomState
from orchestrator.checkpoint.reader import CheckpointReader, Piece, buffer_piece, frozen_pieces, pieces_of
from orchestrator.checkpoint.retention import pinned
from orchestrator.checkpoint.tensors import byte_view, persistent_buffers, safetensors_dtype
from orchestrator.checkpoint.zero import ZeroState
from orchestrator.errors import IntegrityError, NotFound, RunError
from orchestrator.pretrained.reader import BasePiece
from orchestrator.store import Store, layout

logger = logging.getLogger(__name__)
_FRESH, _UNUSABLE = "fresh", "unusable"


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The checkpoint that a group of workers goes on from."""

    folder: Folder
    manifest: Manifest
    bytes_read: int
    """By this rank."""

    @property
    def step(self) -> int:
        return self.manifest.state.step


def resume_newest(
    store: Store, run_id: str, state: ZeroState, module: nn.Module, *, rank: int, random: RandomState | None = None
) -> Resumed | None:
    """Load the newest committed checkpoint that verifies, else the one before it. Collective.

    Rank 0 chooses and tells the others the folder and the manifest's digest; all ranks agree on whether the load
    succeeded. Returns None where nothing is committed.

    Args:
        random: generators to set as they were. A rank that the checkpoint's group did not have keeps its own.

    Raises:
        IntegrityError: there are checkpoints, and none of them can be used, or the pretrained weights cannot.
        RunError: the model has other parameters than the checkpoint.
    """
    failed: list[Folder] = []
    while True:
        choice = tell_all(_choose(store, run_id, failed) if rank == 0 else "", rank=rank)
        if choice == _FRESH:
            return None
        if choice == _UNUSABLE:
            # Not a fresh start: the state may be half filled, and the training so far would silently be repeated.
            raise IntegrityError(
                f"None of the checkpoints committed for {run_id} can be used; the warnings say what is damaged.",
                next_step=f"Restore {store.uri_of(layout.checkpoints(run_id))}, or delete it to train from the start.",
            )
        folder, digest = _parse_choice(choice, run_id)
        fault, resumed = "", None
        try:
            resumed = _load(store, folder, digest, state, module, random, rank=rank)
        except BaseUnusable:
            raise
        except (IntegrityError, NotFound) as e:
            fault = str(e)
        if all_agree(not fault):
            state.refresh()  # collective, so not before it is known that every rank has read its part
            return resumed
        failed.append(folder)
        logger.warning(
            "The checkpoint of step %d cannot be used, trying the one before: %s",
            folder.step,
            fault or "(other rank)",
        )


def load_weights(store: Store, run_id: str, step: int, state: ZeroState, module: nn.Module, *, rank: int) -> Folder:
    """Start from another run's weights: masters, frozen parameters and buffers; moments and counters stay new.

    Collective. The checkpoint is pinned while it is read.

    Raises:
        NotFound: that run has no committed checkpoint of that step. IntegrityError: it is damaged.
        RunError: the model has other parameters than the checkpoint, or the checkpoint holds an adapter.
    """
    choice = tell_all(_choose_step(store, run_id, step) if rank == 0 else "", rank=rank)
    if choice == _FRESH:
        raise NotFound(f"{run_id} has no committed checkpoint of step {step}.")
    folder, digest = _parse_choice(choice, run_id)
    with pinned(store, folder, reason="another run starts from it"):
        manifest, found = read_manifest(store, folder)
        if found != digest:
            raise IntegrityError(f"The manifest of step {step} of {run_id} is not the one that rank 0 read.")
        if manifest.base is not None:
            raise RunError(
                f"model.init_from: step {step} of {run_id} holds an adapter, and no model to start from.",
                next_step=f"headway export {run_id}@{step} --to DIRECTORY, and name that in model.pretrained.",
            )
        _fill(CheckpointReader(store, folder, manifest), store, state, module, kinds=("fp32",))
    all_agree(True)
    state.refresh()
    return folder


def _choose_step(store: Store, run_id: str, step: int) -> str:
    try:
        folder = find(store, run_id, step)
    except NotFound:
        return _FRESH
    return _choice(folder, read_manifest(store, folder)[1])


def _choose(store: Store, run_id: str, failed: Sequence[Folder]) -> str:
    """Rank 0's choice as text: a folder and its manifest's digest, or one of the two words."""
    there = committed(store, run_id)
    for folder in there:
        if folder in failed:
            continue
        try:
            manifest, digest = read_manifest(store, folder)
            CheckpointReader(store, folder, manifest).check_indexes()
        except (IntegrityError, NotFound) as e:
            logger.warning("The checkpoint of step %d cannot be used, trying the one before: %s", folder.step, e)
            continue
        return _choice(folder, digest)
    return _UNUSABLE if there else _FRESH


def _choice(folder: Folder, digest: str) -> str:
    return json.dumps([folder.step, folder.attempt, folder.group, folder.nonce, digest])


def _parse_choice(text: str, run_id: str) -> tuple[Folder, str]:
    step, attempt, group, nonce, digest = json.loads(text)
    return Folder(run_id=run_id, step=step, attempt=attempt, group=group, nonce=nonce), digest


def _load(
    store: Store,
    folder: Folder,
    digest: str,
    state: ZeroState,
    module: nn.Module,
    random: RandomState | None,
    *,
    rank: int,
) -> Resumed:
    manifest, found = read_manifest(store, folder)
    if found != digest:
        raise IntegrityError(f"The manifest of step {folder.step} is not the one that rank 0 read.")
    reader = CheckpointReader(store, folder, manifest)
    from_base = _fill(reader, store, state, module, kinds=KINDS)
    state.optimizer_step = manifest.state.optimizer_step
    if manifest.state.loss_scaler is not None and state.loss_scaler is not None:
        state.loss_scaler = manifest.state.loss_scaler
    if random is not None:
        _restore_random(reader, random, rank=rank)
    return Resumed(folder=folder, manifest=manifest, bytes_read=reader.bytes_read + from_base)


def load_base(store: Store, origin: Origin, state: ZeroState, module: nn.Module) -> int:
    """Start from pretrained weights: whatever they hold of the model, masters, frozen parameters and buffers, read by
    each rank for its own part alone. What they lack stays as it was initialised. Collective.

    Returns the bytes that this rank has read.

    Raises:
        BaseUnusable: they are gone, or damaged. RunError: a value that the precision cannot hold.
    """
    reader, filling = open_base(store, origin.base), _Filling()
    for fragment in state.fragments():
        if fragment.parameter in origin.tensors:
            filling.from_base(origin.tensors[fragment.parameter], fragment.start, fragment.tensors["fp32"])
    for fragment in state.frozen():
        if fragment.parameter in origin.tensors:
            filling.from_base(origin.tensors[fragment.parameter], fragment.start, fragment.tensors["frozen"])
    for name, tensor in persistent_buffers(module).items():
        stored = reader.manifest.tensors.get(plain_name(name))
        if stored is not None and tuple(stored.shape) == tuple(tensor.shape):
            filling.from_base(plain_name(name), 0, tensor)
    read_pieces(reader, filling.base_pieces)
    filling.finish()
    all_agree(True)
    state.refresh()
    return reader.bytes_read


def _fill(reader: CheckpointReader, store: Store, state: ZeroState, module: nn.Module, *, kinds: Sequence[str]) -> int:
    """Fill this rank's part of the state from a checkpoint; :meth:`ZeroState.refresh` comes after.

    Returns the bytes read of the pretrained weights that hold what the checkpoint does not.

    Raises:
        RunError: the model has other parameters than the checkpoint. IntegrityError: damaged bytes.
    """
    manifest = reader.manifest
    require_same_parameters(manifest, state)
    filling = _Filling()
    for fragment in state.fragments():
        for kind in kinds:
            target = filling.view(fragment.tensors[kind])
            filling.pieces += pieces_of(manifest, fragment.parameter, kind, fragment.start, target)
    for fragment in state.frozen():
        source = manifest.frozen[fragment.parameter].base
        if source is not None:
            filling.from_base(source, fragment.start, fragment.tensors["frozen"])
            continue
        target = filling.view(fragment.tensors["frozen"])
        filling.pieces += frozen_pieces(manifest, fragment.parameter, fragment.start, target)
    for name, tensor in persistent_buffers(module).items():
        filling.pieces.append(buffer_piece(_matching_buffer(manifest, name, tensor), filling.view(tensor)))
    reader.read(filling.pieces)
    from_base = 0
    if manifest.base is not None:
        base = open_base(store, manifest.base)
        read_pieces(base, filling.base_pieces)
        from_base = base.bytes_read
    filling.finish()
    return from_base


@dataclass
class _Filling:
    """Byte ranges on their way into tensors; those that are not plain host memory are filled by way of a copy."""

    pieces: list[Piece] = field(default_factory=list)
    base_pieces: list[BasePiece] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def view(self, tensor: Tensor) -> memoryview:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return byte_view(tensor)
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.copies.append((tensor, host))
        return byte_view(host)

    def from_base(self, name: str, start: int, tensor: Tensor) -> None:
        """Fill a tensor with a base's elements from ``start`` on, in the tensor's own dtype."""
        dtype = safetensors_dtype(tensor.dtype)
        self.base_pieces.append(BasePiece(tensor=name, start=start, target=self.view(tensor), dtype=dtype))

    def finish(self) -> None:
        for target, host in self.copies:
            target.detach().copy_(host)


def _restore_random(reader: CheckpointReader, random: RandomState, *, rank: int) -> None:
    stored = {name: reader.manifest.random.get(f"{rank}/{name}") for name in random.tensors}
    found = {name: b for name, b in stored.items() if b is not None and _is_like(b, random.tensors[name])}
    if found.keys() != random.tensors.keys():
        logger.warning("Rank %d keeps its own random state: the checkpoint has none that fits it.", rank)
        return
    reader.read([buffer_piece(buffer, byte_view(random.tensors[name])) for name, buffer in found.items()])
    random.restore()


def require_same_parameters(manifest: Manifest, state: ZeroState) -> None:
    """
    Raises:
        RunError: naming the first parameter that differs.
    """
    stored = {name: (p.shape, "trained") for name, p in manifest.parameters.items()} | {
        name: (p.shape, f"frozen, {p.dtype}") for name, p in manifest.frozen.items()
    }
    ours = {name: (shape, "trained") for name, shape in state.shapes.items()} | {
        name: (shape, f"frozen, {safetensors_dtype(dtype)}") for name, (dtype, shape) in state.frozen_shapes.items()
    }
    for name in sorted(stored.keys() | ours.keys()):
        if stored.get(name) != ours.get(name):
            raise RunError(
                f"The checkpoint of step {manifest.state.step} holds {name} as {stored.get(name)}, "
                f"the model has it as {ours.get(name)}.",
                next_step="Build the model as it was, or give the run another name to train this one from the start.",
            )


def _matching_buffer(manifest: Manifest, name: str, tensor: Tensor) -> Buffer:
    stored = manifest.buffers.get(name)
    if stored is None or not _is_like(stored, tensor):
        raise RunError(
            f"The checkpoint of step {manifest.state.step} has no matching buffer {name}.",
            next_step="Build the model as it was, or give the run another name to train this one from the start.",
        )
    return stored


def _is_like(stored: Buffer, tensor: Tensor) -> bool:
    return stored.shape == tuple(tensor.shape) and stored.dtype == safetensors_dtype(tensor.dtype)
