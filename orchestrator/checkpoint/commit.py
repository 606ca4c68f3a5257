"""Committing: rank 0 waits for what every rank published and makes one manifest of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from pydantic import ValidationError

from orchestrator.checkpoint.base import Origin
from orchestrator.checkpoint.catalog import MANIFEST, Folder, reread
from orchestrator.checkpoint.format import (
    Buffer,
    Fragment,
    FrozenFragment,
    FrozenParameter,
    Manifest,
    Parameter,
    RankFile,
    State,
    unseal,
)
from orchestrator.checkpoint.tensors import safetensors_dtype
from orchestrator.errors import Fenced, IntegrityError, StoreError
from orchestrator.store import Store

COMMIT_TIMEOUT_S = 600.0
ABANDON_S = 10.0
"""How much longer to wait for other ranks once this one has an error on its way out."""
_POLL_S = 0.1


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def await_ranks(
    store: Store, folder: Folder, *, world_size: int, timeout_s: float, abandoned: threading.Event
) -> list[dict[str, Any]]:
    """What each rank published, in rank order. Once ``abandoned`` is set it waits ABANDON_S more at most.

    Raises:
        StoreError: some ranks failed, or did not finish in time; it names them.
        Fenced: a newer attempt or group has barred this folder, and may have deleted what was published.
    """
    wanted = {f"{folder.prefix}{rank_name(rank)}.json": rank for rank in range(world_size)}
    started_s = time.monotonic()
    while True:
        if abandoned.is_set():
            timeout_s = min(timeout_s, time.monotonic() - started_s + ABANDON_S)
            abandoned = threading.Event()  # seen
        there = {item.key for item in store.list(folder.prefix)}
        missing = [rank for key, rank in wanted.items() if key not in there]
        if not missing:
            return [_read_part(store, key) for key in wanted]
        if folder.prefix + MANIFEST in there:
            raise Fenced(f"{store.uri_of(folder.prefix)}: a newer attempt or group of workers has given this save up.")
        failed = [rank for rank in missing if f"{folder.prefix}{rank_name(rank)}.failed.json" in there]
        if failed:
            raise StoreError(
                f"{store.uri_of(folder.prefix)}: ranks {failed} could not upload their part; "
                "the checkpoint is not committed."
            )
        if time.monotonic() - started_s > timeout_s:
            raise StoreError(
                f"{store.uri_of(folder.prefix)}: ranks {missing} did not finish uploading "
                f"within {timeout_s:.0f} s; the checkpoint is not committed."
            )
        time.sleep(_POLL_S)


def _read_part(store: Store, key: str) -> dict[str, Any]:
    return reread(lambda: unseal(store.get(key), source=store.uri_of(key)))


def assemble(
    published: list[dict[str, Any]],
    *,
    folder: Folder,
    shapes: dict[str, tuple[int, ...]],
    frozen_shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    origin: Origin | None = None,
    scalars: State,
    created_s: float,
) -> Manifest:
    """The manifest of what all ranks published, checked for holes. Pure.

    Raises:
        IntegrityError: elements are missing, or given twice.
    """
    fragments: dict[str, list[Fragment]] = {name: [] for name in shapes}
    frozen: dict[str, list[FrozenFragment]] = {name: [] for name in frozen_shapes}
    whole: dict[str, dict[str, Buffer]] = {"buffer": {}, "random": {}}
    for rank, part in enumerate(published):
        for f in part["fragments"]:
            fragments[f.pop("parameter")].append(Fragment(file=rank, **f))
        for f in part["frozen"]:
            frozen[f.pop("parameter")].append(FrozenFragment(file=rank, **f))
        for name, b in part["whole"].items():
            kind, _, rest = name.partition("/")
            whole[kind][rest] = Buffer(file=rank, **b)
    try:
        return Manifest(
            run_id=folder.run_id,
            attempt=folder.attempt,
            group=folder.group,
            nonce=folder.nonce,
            world_size=len(published),
            created_s=created_s,
            state=scalars,
            files=tuple(RankFile.model_validate(part["file"]) for part in published),
            parameters={
                name: Parameter(shape=shapes[name], fragments=tuple(sorted(found, key=lambda f: f.start)))
                for name, found in fragments.items()
            },
            frozen={
                name: FrozenParameter(
                    dtype=safetensors_dtype(frozen_shapes[name][0]),
                    shape=frozen_shapes[name][1],
                    fragments=tuple(sorted(found, key=lambda f: f.start)),
                    base=origin.tensors.get(name) if origin is not None else None,
                    lora=origin.lora.get(name) if origin is not None else None,
                )
                for name, found in frozen.items()
            },
            base=origin.base if origin is not None and origin.tensors.keys() & frozen.keys() else None,
            buffers=whole["buffer"],
            random=whole["random"],
        )
    except ValidationError as e:
        raise IntegrityError(
            f"Step {scalars.step}: the ranks' parts do not make a whole: {e.errors()[0]['msg']}."
        ) from e
