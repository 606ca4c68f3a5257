"""Which checkpoints of a run are committed. Needs no torch, so the command line can ask."""

from __future__ import annotations

import hashlib
import json

from orchestrator.checkpoint.format import Manifest, parse_manifest
from orchestrator.errors import IntegrityError
from orchestrator.store import Store, layout


def committed_steps(store: Store, run_id: str) -> list[int]:
    """Steps whose manifest exists, newest first."""
    prefix = layout.checkpoints(run_id)
    steps = []
    for item in store.list(prefix):
        folder, _, name = item.key.removeprefix(prefix).partition("/")
        if name == "manifest.json" and folder.startswith("step-") and folder[5:].isdigit():
            steps.append(int(folder[5:]))
    return sorted(steps, reverse=True)


def read_manifest(store: Store, run_id: str, step: int) -> tuple[Manifest, str]:
    """A committed checkpoint's manifest and the SHA-256 of its bytes.

    Raises:
        IntegrityError: it is damaged. NotFound: not committed.
    """
    key = layout.checkpoint_manifest(run_id, step)
    data = store.get(key)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{store.uri_of(key)} is not JSON: {e}.") from e
    manifest = parse_manifest(document, source=store.uri_of(key))
    if (manifest.run_id, manifest.state.step) != (run_id, step):
        raise IntegrityError(f"{store.uri_of(key)} belongs to step {manifest.state.step} of {manifest.run_id}.")
    return manifest, hashlib.sha256(data).hexdigest()
