"""``headway export``: a checkpoint's weights as a Hugging Face directory, on disk or in S3. Needs no ray."""

from __future__ import annotations

import importlib
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from orchestrator.checkpoint.catalog import Folder, read_manifest
from orchestrator.checkpoint.convert import FLOATS
from orchestrator.checkpoint.export import (
    INDEX_NAME,
    ExportedFile,
    FileLayout,
    Form,
    export_to_directory,
    export_to_store,
    plan_files,
    weight_index,
)
from orchestrator.checkpoint.format import Manifest
from orchestrator.checkpoint.retention import pinned
from orchestrator.checkpoint.sources import Weights, open_weights
from orchestrator.commands.locate import find_checkpoints, locate
from orchestrator.errors import AlreadyExists, EnvironmentUnusable, NotFound, SpecError, StoreError, UsageError
from orchestrator.pretrained.format import read_base
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store, layout
from orchestrator.store.s3 import split_uri

_ASSETS = "workloads.export"  # by name: orchestrator imports nothing of workloads
_WEIGHTS_ONLY = "Weights only, without config and tokenizer"
_FORMS: dict[str, Form] = {"merged": "merged", "adapter": "adapter"}
DONE = "export.json"
"""Written last, so that an export is whole where it is; it lists the files with their digests."""
CLAIM = "claim.json"
"""At a prefix in S3 for as long as one export writes there."""


def export(
    name: str,
    *,
    to: str,
    dtype: str,
    max_shard_bytes: int,
    form: str,
    store_uri: str | None,
    reporter: Reporter,
) -> Result:
    """Write the newest checkpoint that ``name`` stands for.

    Args:
        form: of a checkpoint that holds a LoRA adapter: ``merged``, the whole model, or ``adapter``, peft's files
            alone. Any other checkpoint can be written as the whole model only.

    Raises:
        UsageError: there is no such checkpoint, or the place is taken. IntegrityError: it is damaged, or the
        pretrained weights that it refers to are. RunError: it holds no adapter.
    """
    if dtype != "auto" and dtype not in FLOATS:
        raise UsageError(f"--dtype {dtype} is none that weights are exported as.", next_step="Give fp32, bf16 or fp16.")
    wanted = _form(form)
    store, name = locate(name, store_uri)
    folder = find_checkpoints(store, name)[0]
    place = _place(to, store)
    try:
        with pinned(store, folder, reason="headway export reads it"):
            facts = _write(store, folder, place, dtype, max_shard_bytes, wanted, reporter)
        place.finish(facts)
    except BaseException:
        place.discard()
        raise
    said = f"Step {folder.step} of {folder.run_id} is exported to {to} as {facts['dtype']}."
    if "base" in facts:
        said += f" It is an adapter, and needs the pretrained model of {facts['base']['uri']}."
    return {**facts, "to": to}, said


def _form(text: str) -> Form:
    """
    Raises:
        UsageError: there is no such form.
    """
    if text not in _FORMS:
        raise UsageError(f"--lora {text} is no form of an export.", next_step="Give merged or adapter.")
    return _FORMS[text]


def _write(
    store: Store, folder: Folder, place: Place, dtype: str, max_shard_bytes: int, form: Form, reporter: Reporter
) -> dict[str, Any]:
    manifest, _ = read_manifest(store, folder)
    chosen = manifest.state.precision if dtype == "auto" else dtype
    files = plan_files(manifest, dtype=chosen, max_shard_bytes=max_shard_bytes, form=form)
    weights = open_weights(store, folder, manifest)
    written = []
    for file in files:
        written.append(place.write(weights, file))
        reporter.say(f"{file.name}: {written[-1].size_bytes / 1e6:,.1f} MB")
    index = weight_index(files)
    if index is not None:
        place.put(INDEX_NAME, index)
    return {
        "checkpoint": store.uri_of(folder.prefix),
        "step": folder.step,
        "dtype": chosen,
        **_base_facts(store, manifest, form),
        "files": {file.name: {"size_bytes": file.size_bytes, "sha256": file.sha256} for file in written},
        "assets": _put_assets(store, folder, place, chosen, form, reporter),
    }


def _base_facts(store: Store, manifest: Manifest, form: Form) -> dict[str, object]:
    """What an adapter is nothing without."""
    if form == "merged" or manifest.base is None:
        return {}
    return {"base": {**manifest.base.model_dump(), "uri": read_base(store, manifest.base.fingerprint).uri}}


class Place(Protocol):
    """Where an export goes."""

    def write(self, weights: Weights, file: FileLayout) -> ExportedFile: ...

    def put(self, name: str, data: bytes) -> None: ...

    def finish(self, facts: dict[str, object]) -> None: ...

    def discard(self) -> None: ...


class _Directory:
    """A new directory, which appears once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            raise UsageError(f"{path} exists.", next_step="Name a directory that does not: --to DIRECTORY")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        except OSError as e:
            raise EnvironmentUnusable(f"{path.parent} cannot be written to: {e}.") from e

    def write(self, weights: Weights, file: FileLayout) -> ExportedFile:
        return export_to_directory(weights, file, self._partial)

    def put(self, name: str, data: bytes) -> None:
        with self._writing():
            (self._partial / name).write_bytes(data)

    def finish(self, facts: dict[str, object]) -> None:
        with self._writing():
            (self._partial / DONE).write_text(json.dumps(facts, indent=1))
            self._partial.chmod(0o755)
            self._partial.rename(self._path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise EnvironmentUnusable(
                f"{self._path} cannot be written: {e}.", next_step="Free space there, or name another place."
            ) from e

    def discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


class _Prefix:
    """A prefix in S3 that is empty but for the claim on it. What is there counts once its export.json exists."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            store.create_json(CLAIM, {"nonce": secrets.token_hex(8)})
        except AlreadyExists as e:
            raise UsageError(
                f"Another export is, or was, being written to {store.uri}.",
                next_step=f"Name another prefix, or delete what is there ({CLAIM} with it) if none is running.",
            ) from e
        self._own = [CLAIM]  # what a failure takes away: nothing but what this export wrote
        try:  # claimed first, then looked at: else an export that ended in between would be written over
            _require_empty(store)
        except BaseException:
            self.discard()
            raise

    def write(self, weights: Weights, file: FileLayout) -> ExportedFile:
        self._own.append(file.name)
        return export_to_store(weights, file, self._store, "")

    def put(self, name: str, data: bytes) -> None:
        self._own.append(name)
        self._store.upload(name, data)

    def finish(self, facts: dict[str, object]) -> None:
        self._own.append(DONE)  # before it is there: an answer that is lost leaves it open whether it is
        self._store.create_json(DONE, facts)
        self._own = [CLAIM]
        self.discard()

    def discard(self) -> None:
        """Take away what this export wrote, its claim last. What cannot be deleted stays, and so does the claim."""
        with suppress(StoreError):  # the first error is the one to tell
            self._store.delete(reversed(self._own[1:]))
            self._store.delete([CLAIM])


def _require_empty(store: Store) -> None:
    """
    Raises:
        UsageError: there is something besides the claim.
    """
    if any(item.key != CLAIM for item in store.list("")):
        raise UsageError(f"{store.uri} is not empty.", next_step="Name a prefix that is: --to s3://bucket/prefix")


def _place(to: str, store: Store) -> Place:
    return _Prefix(store.at(*split_uri(to))) if to.startswith("s3://") else _Directory(Path(to))


def _put_assets(store: Store, folder: Folder, place: Place, dtype: str, form: Form, reporter: Reporter) -> list[str]:
    """Config and tokenizer, where the checkpoint is a run's and its task is installed here. Returns their names."""
    if not store.exists(layout.run_spec(folder.run_id)):
        reporter.say(f"{folder.run_id} was not trained from a run file: weights only, without config and tokenizer.")
        return []
    with tempfile.TemporaryDirectory(prefix="headway-export-") as scratch:
        try:
            workload = importlib.import_module(_ASSETS)
            names: list[str] = workload.save_assets(store, folder.run_id, Path(scratch), dtype=dtype, form=form)
        except ModuleNotFoundError as e:  # now, or once the task asks for it
            reporter.say(f"{_WEIGHTS_ONLY}: this installation lacks {e.name} (headway[train]).")
            return []
        except (SpecError, NotFound) as e:
            reporter.say(f"{_WEIGHTS_ONLY}: {e}")
            return []
        for name in names:
            place.put(name, (Path(scratch) / name).read_bytes())
    return names
