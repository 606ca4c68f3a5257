"""``headway list``: what is in the store, in tables. Needs neither ray nor torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint.base import open_base, require_files
from orchestrator.checkpoint.catalog import Folder, manifests
from orchestrator.checkpoint.format import Manifest
from orchestrator.checkpoint.reader import CheckpointReader
from orchestrator.commands.context import find_store
from orchestrator.commands.list_datasets import dataset_words, list_datasets
from orchestrator.commands.list_runs import list_runs, run_words
from orchestrator.commands.show import resolve_checkpoints
from orchestrator.commands.text import Rows, table
from orchestrator.errors import IntegrityError, NotFound, UsageError
from orchestrator.release import channels
from orchestrator.release.versions import list_versions
from orchestrator.reporter import Result
from orchestrator.store import Store


def list_things(what: str, run_id: str | None, *, store_uri: str | None) -> Result:
    known: dict[str, Callable[[Store], Rows]] = {
        "runs": list_runs,
        "models": _models,
        "datasets": list_datasets,
        "checkpoints": lambda store: _checkpoints(store, resolve_checkpoints(store, run_id or "")),
    }
    if what not in known:
        raise UsageError(f"There is no list of {what!r}.", next_step=f"Choose one of {', '.join(known)}.")
    if what == "checkpoints" and not run_id:
        raise UsageError("headway list checkpoints needs a run.", next_step="See: headway list runs")
    rows = known[what](find_store(store_uri))
    told = {"runs": run_words, "datasets": dataset_words}.get(what)
    shown = [told(row) for row in rows] if told is not None else rows
    return {what: rows}, table(shown) if rows else f"There are no {what} yet."


def _models(store: Store) -> Rows:
    rows = []
    for model in store.list_folders("models/"):
        for version in list_versions(store, model):
            rows.append(
                {
                    "version": version.name,
                    "run": version.run_id,
                    "eval_loss": version.evaluation.get("loss"),
                    "channels": ", ".join(
                        name
                        for name in store.list_folders(f"models/{model}/channels/")
                        if (entry := channels.newest(store, model, name)) and entry.version == version.number
                    ),
                }
            )
    return rows


def _checkpoints(store: Store, run_id: str) -> Rows:
    return [_checkpoint(store, folder, found) for folder, found in manifests(store, run_id)]


def _checkpoint(store: Store, folder: Folder, found: Manifest | IntegrityError) -> dict[str, Any]:
    row: dict[str, Any] = {"step": folder.step, "attempt": folder.attempt}
    if isinstance(found, IntegrityError):
        return {**row, "size_bytes": None, "world_size": None, "verified": f"damaged: {found.message}", "age_s": None}
    try:
        CheckpointReader(store, folder, found).check_indexes()
        if found.base is not None:
            require_files(store, open_base(store, found.base))
        verified = "yes"
    except (IntegrityError, NotFound) as e:
        verified = f"damaged: {e.message}"
    return {
        **row,
        "size_bytes": found.size_bytes,
        "world_size": found.world_size,
        "verified": verified,
        "age_s": round(time.time() - found.created_s),
    }
