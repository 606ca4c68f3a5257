"""What a person means by a checkpoint, a version or a dataset: RUN@STEP, MODEL@N, NAME@FINGERPRINT, or its S3 address.

A bare name is a run's, and means its newest checkpoint; where there is no such run, it is a dataset's.
"""

from __future__ import annotations

import re

from orchestrator.checkpoint.catalog import Folder, committed
from orchestrator.commands.context import find_store
from orchestrator.commands.show import resolve_checkpoints
from orchestrator.commands.show_dataset import named_dataset
from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import UsageError
from orchestrator.store import Store, open_store
from orchestrator.store.s3 import split_uri

_CHECKPOINT_URI = re.compile(r"(s3://.+)/runs/([^/]+)(?:/checkpoints(?:/step-0*(\d+)(?:/([^/]+))?)?)?/?")
_DATASET_URI = re.compile(r"(s3://.+)/datasets/([^/]+)/([0-9a-f]{16})/?")
_VERSION_URI = re.compile(r"(s3://.+)/models/([^/]+)/versions/0*(\d+)/?")


def locate(name: str, store_uri: str | None) -> tuple[Store, str]:
    """The store that a name or an address lies in, and its name there: NAME, NAME@NUMBER, RUN@STEP/FOLDER or
    NAME@FINGERPRINT.

    Raises:
        UsageError: an address of something else.
    """
    if not name.startswith("s3://"):
        return find_store(store_uri), name
    checkpoint, version, dataset = (each.fullmatch(name) for each in (_CHECKPOINT_URI, _VERSION_URI, _DATASET_URI))
    if checkpoint:
        root, run, step, folder = checkpoint.groups()
        return _store_at(root, store_uri), run + (f"@{step}" if step else "") + (f"/{folder}" if folder else "")
    if version:
        root, model, number = version.groups()
        return _store_at(root, store_uri), f"{model}@{number}"
    if dataset:
        root, folder, fingerprint = dataset.groups()
        return _store_at(root, store_uri), f"{folder}@{fingerprint}"
    raise UsageError(
        f"{name} is the address of no checkpoint, of no version and of no dataset.",
        next_step="Give s3://…/runs/RUN/checkpoints/step-N, s3://…/models/MODEL/versions/N, "
        "s3://…/datasets/NAME/FINGERPRINT, or RUN@STEP.",
    )


def find_checkpoints(store: Store, name: str) -> list[Folder]:
    """The committed checkpoints that a name stands for, newest first: all of a run's, or those of a step.

    Raises:
        UsageError: there is none.
    """
    name, _, folder = name.partition("/")
    run, _, step = name.partition("@")
    if step and not (step.isascii() and step.isdigit()):
        raise UsageError(f"{name!r} is not RUN@STEP.", next_step=f"See: headway list checkpoints {run}")
    there = committed(store, resolve_checkpoints(store, run))
    found = [f for f in there if (not step or f.step == int(step)) and (not folder or f.name == folder)]
    if not found:
        steps = ", ".join(str(f.step) for f in there) or "none"
        raise UsageError(
            f"There is no committed checkpoint {name!r} in {store.uri}.", next_step=f"Steps that have one: {steps}."
        )
    return found


def find_named_dataset(store: Store, name: str) -> DatasetManifest | None:
    """The dataset that a name stands for; None where it stands for something else, or for nothing.

    Raises:
        UsageError: there is none of this fingerprint. IntegrityError: its manifest cannot be read.
    """
    if "@" not in name and _names_a_run(store, name):
        return None
    return named_dataset(store, name)


def _names_a_run(store: Store, name: str) -> bool:
    try:
        resolve_checkpoints(store, name)
    except UsageError:
        return False
    return True


def _store_at(root: str, store_uri: str | None) -> Store:
    """The store at an address, with the embedded stack's keys where it runs here."""
    try:
        known = find_store(store_uri)
    except UsageError:
        return open_store(root)
    return known.at(*split_uri(root))
