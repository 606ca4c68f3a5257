"""A base model's small files as a directory on this node: config, tokenizer, chat template; no weights."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from orchestrator.checkpoint.catalog import reread
from orchestrator.errors import EnvironmentUnusable
from orchestrator.pretrained.format import BaseFile, BaseManifest
from orchestrator.store import Store


def fetch_assets(store: Store, manifest: BaseManifest, folder: Path) -> Path:
    """The directory in ``folder`` that holds them all, verified. Several processes may ask for it at once.

    Files that are there already are checked, and fetched again where they are not what they were.

    Raises:
        IntegrityError: damaged in the store. NotFound: gone from there. EnvironmentUnusable: the disk refuses.
    """
    directory = folder / f"{manifest.fingerprint}-{manifest.digest[:8]}"
    try:
        if _is_intact(directory, manifest):
            return directory
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=folder) as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            for name, file in manifest.files.items():
                (fresh / name).write_bytes(_get(store, manifest.prefix + name, file))
            _replace(directory, fresh, manifest)
    except OSError as e:
        raise EnvironmentUnusable(
            f"{directory} cannot be written: {e}.", next_step="Free space there, or name another cache."
        ) from e
    return directory


def _replace(directory: Path, fresh: Path, manifest: BaseManifest) -> None:
    """Move ``fresh`` to ``directory``, unless another process has put a sound one there meanwhile."""
    try:
        fresh.rename(directory)
    except OSError:  # something is there
        if _is_intact(directory, manifest):
            return
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)


def _get(store: Store, key: str, file: BaseFile) -> bytes:
    return reread(lambda: store.get_verified(key, sha256=file.sha256, size_bytes=file.size_bytes))


def _is_intact(directory: Path, manifest: BaseManifest) -> bool:
    return all(_holds(directory / name, file) for name, file in manifest.files.items())


def _holds(path: Path, file: BaseFile) -> bool:
    try:
        return path.stat().st_size == file.size_bytes and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    except FileNotFoundError:
        return False
