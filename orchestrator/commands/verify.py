"""``headway verify``: read a thing in the store to its last byte. Needs neither ray nor torch."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.checkpoint.base import open_base
from orchestrator.checkpoint.catalog import Folder, committed
from orchestrator.checkpoint.reader import READ_BYTES
from orchestrator.checkpoint.retention import pinned
from orchestrator.checkpoint.verify import verify
from orchestrator.commands.locate import find_checkpoints, find_named_dataset, locate
from orchestrator.commands.verify_dataset import verify_dataset
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.release.versions import Version, VersionFile, read_version
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store, layout

_OF_A_RUN = "A run goes on from its newest checkpoint that verifies: submit it again."
_OF_A_VERSION = "Export the run again, or roll back to another version."


def verify_all(name: str, *, store_uri: str | None, reporter: Reporter) -> Result:
    """Read every byte of checkpoints, of a version or of a dataset, and check it.

    Raises:
        IntegrityError: after everything was read, if anything is damaged. UsageError: there is no such thing.
    """
    store, name = locate(name, store_uri)
    dataset = find_named_dataset(store, name)
    if dataset is not None:
        return verify_dataset(store, dataset, reporter)
    faults: dict[str, str] = {}
    read: dict[str, int] = {}
    for what, check in _checks(store, name):
        started = time.monotonic()
        try:
            num_bytes = check()
        except (IntegrityError, NotFound) as e:
            faults[what] = e.message
            reporter.say(f"{what}: damaged: {e.message}")
            continue
        if num_bytes is None:
            reporter.say(f"{what}: deleted meanwhile")
            continue
        read[what] = num_bytes
        reporter.say(f"{what}: verified, {num_bytes / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
    if faults:
        raise IntegrityError(
            f"{len(faults)} of {len(faults) + len(read)} are damaged: {', '.join(faults)}.",
            next_step=_OF_A_VERSION if _version_of(store, name) else _OF_A_RUN,
        )
    return {"verified": read}, f"All {len(read)} verified, {sum(read.values()) / 1e6:,.1f} MB read."


def _checks(store: Store, name: str) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """What to read, and a call that reads it and returns how many bytes that were; None where it is gone."""
    version = _version_of(store, name)
    if version is not None:
        for file_name, file in version.files.items():
            key = layout.version(version.model, version.number) + file_name
            yield f"{name}/{file_name}", partial(_read_file, store, key, file)
        if version.base is not None:
            yield from _checks_of_base(store, version.base)
        return
    folders = find_checkpoints(store, name)
    num_of_step = Counter(folder.step for folder in folders)
    for folder in folders:
        which = f"/{folder.name}" if num_of_step[folder.step] > 1 else ""
        yield f"{folder.run_id}@{folder.step}{which}", partial(_read_checkpoint, store, folder)


def _checks_of_base(store: Store, reference: BaseReference) -> Iterator[tuple[str, Callable[[], int]]]:
    base = open_base(store, reference).manifest
    for part in (base.files, base.weights):
        for file_name, file in part.items():
            recorded = VersionFile(size_bytes=file.size_bytes, sha256=file.sha256)
            check = partial(_read_file, store, base.prefix + file_name, recorded)
            yield f"base {base.fingerprint}/{file_name}", check


def _version_of(store: Store, name: str) -> Version | None:
    """The version that a name stands for; None where it stands for checkpoints."""
    model, _, number = name.partition("@")
    if not (number.isascii() and number.isdigit()) or committed(store, model):
        return None
    if not store.exists(layout.version_manifest(model, int(number))):
        return None
    return read_version(store, model, int(number))


def _read_checkpoint(store: Store, folder: Folder) -> int | None:
    with pinned(store, folder, reason="headway verify reads it"):
        try:
            return verify(store, folder).num_bytes
        except NotFound:
            if folder in committed(store, folder.run_id):
                raise
            return None  # retention has deleted it since the listing


def _read_file(store: Store, key: str, file: VersionFile) -> int:
    digest, num_bytes = hashlib.sha256(), 0
    while part := store.get_range(key, num_bytes, READ_BYTES):
        digest.update(part)
        num_bytes += len(part)
    if num_bytes != file.size_bytes or digest.hexdigest() != file.sha256 or not store.exists(key):
        raise IntegrityError(f"{store.uri_of(key)} does not match its recorded digest.")
    return num_bytes
