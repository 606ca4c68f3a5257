"""A pretrained model into the store, once: whoever creates the manifest first has made the base.

Everyone who finds no manifest copies into a folder of their own nonce. Of two who do so at once, one creates the
manifest; the other deletes what it copied and takes the one that stands. What a killed process left is deleted by
whoever makes the base after it. This module imports no torch, so that the tasks that copy stay small.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.dataset.source import SourceFile
from orchestrator.errors import AlreadyExists, HeadwayError, NotFound, RunError, SpecError, StoreError
from orchestrator.pretrained.copy import CopiedWeights, copy_small, copy_to_disk, copy_weights, read_small
from orchestrator.pretrained.format import BaseFile, BaseManifest, BaseTensor, WeightFile, read_base
from orchestrator.pretrained.selection import CONFIG, WEIGHT_INDEX, require_plain_config, weight_map
from orchestrator.pretrained.source import BaseSource, list_base
from orchestrator.store import Store, layout, open_store
from workloads.ray_tasks import all_of

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")


class Runner(Protocol):
    """Carries out one function call per job, each with the store, and gives the results in the jobs' order."""

    def __call__(self, work: Callable[[Job, Store], Result], jobs: Sequence[Job], store: Store) -> list[Result]: ...


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a base's manifest says of the files that were copied."""

    files: dict[str, BaseFile]
    weights: dict[str, WeightFile]
    tensors: dict[str, BaseTensor]


@dataclass(frozen=True, kw_only=True)
class WeightJob:
    """One weight file that is to be copied."""

    file: SourceFile
    prefix: str


@dataclass(frozen=True, kw_only=True)
class GgufJob:
    """A GGUF file that is to be converted, and what that gives copied."""

    file: SourceFile
    prefix: str


def one_by_one(work: Callable[[Job, Store], Result], jobs: Sequence[Job], store: Store) -> list[Result]:
    """A :data:`Runner` in this process."""
    return [work(job, store) for job in jobs]


def as_ray_tasks(work: Callable[[Job, Store], Result], jobs: Sequence[Job], store: Store) -> list[Result]:
    """A :data:`Runner` that has all jobs done at once, as far as the cluster has CPUs for them."""
    import ray

    return all_of([ray.remote(num_cpus=1)(_in_task).remote(work, job, store.uri) for job in jobs])


def _in_task(work: Callable[[Job, Store], Result], job: Job, store: str) -> Result:
    return work(job, open_store(store))


def fetch_base(source: BaseSource, store: Store, *, run_all: Runner = one_by_one) -> BaseManifest:
    """The base of this fingerprint: the one that stands, or a new one.

    Args:
        run_all: has the jobs done, of which each copies one weight file. Files on this machine's disk are copied here.

    Raises:
        RunError: what lies there cannot be trained from. IntegrityError: it is not what was listed, or what the hub
        says it is. EnvironmentUnusable: it, the hub or the store cannot be reached.
    """
    standing = _standing(store, source.fingerprint)
    if standing is not None:
        return standing
    prefix = f"{layout.base(source.fingerprint)}{secrets.token_hex(8)}/"
    try:
        contents = _copy(source, store, prefix, run_all)
    except BaseException as e:
        _discard(store, prefix)
        made_meanwhile = _standing(store, source.fingerprint) if isinstance(e, HeadwayError) else None
        if made_meanwhile is None:
            raise
        return made_meanwhile
    manifest = BaseManifest(
        fingerprint=source.fingerprint,
        uri=source.uri,
        prefix=prefix,
        files=contents.files,
        weights=contents.weights,
        tensors=contents.tensors,
        created_s=time.time(),
    )
    try:
        # Any other error than this one leaves it open whether the manifest was created: then the files stay.
        store.create(layout.base_manifest(source.fingerprint), manifest.sealed())
    except AlreadyExists:
        _discard(store, prefix)
        return read_base(store, source.fingerprint)
    _discard_others(store, manifest)
    return manifest


def _copy(source: BaseSource, store: Store, prefix: str, run_all: Runner) -> Contents:
    try:
        if source.is_hub:
            from workloads import fetch_hub

            return _copy_files(fetch_hub.list_files(source), store, prefix, run_all)
        if not source.uri.startswith("s3://"):
            run_all = one_by_one  # other machines do not see this disk
        if source.is_gguf:
            return run_all(_copy_gguf, [GgufJob(file=source.files[0], prefix=prefix)], store)[0]
        return _copy_files(source.files, store, prefix, run_all)
    except SpecError as e:  # found in what is copied, so that no retry of this run changes it
        raise RunError(e.message, next_step=e.next_step) from e


def _copy_files(listed: Sequence[SourceFile], store: Store, prefix: str, run_all: Runner) -> Contents:
    """Small files first, since they tell early what cannot be trained from."""
    small = {file.path: _read_small(file, store) for file in listed if not _is_weights(file)}
    require_plain_config(small[CONFIG], source=next(file.uri for file in listed if file.path == CONFIG))
    files = {name: copy_small(name, data, store, prefix) for name, data in small.items()}
    jobs = [WeightJob(file=file, prefix=prefix) for file in listed if _is_weights(file)]
    copied = run_all(_copy_weights, jobs, store)
    index = weight_map(small[WEIGHT_INDEX], source=WEIGHT_INDEX) if WEIGHT_INDEX in small else None
    return Contents(files=files, weights={c.name: c.file for c in copied}, tensors=place_tensors(copied, index))


def place_tensors(copied: Sequence[CopiedWeights], index: dict[str, str] | None) -> dict[str, BaseTensor]:
    """Where each tensor lies. Where several files hold one, the index says which counts. Pure.

    Raises:
        RunError: the index names a tensor that its file lacks, or is silent on one that two files hold.
    """
    holders: dict[str, dict[str, BaseTensor]] = {}
    for weights in copied:
        for name, tensor in weights.tensors.items():
            holders.setdefault(name, {})[weights.name] = BaseTensor(file=weights.name, **tensor.model_dump())
    found = {}
    for name in sorted({*holders, *(index or {})}):
        held = holders.get(name, {})
        file = (index or {}).get(name) or next(iter(held))
        if file not in held or (len(held) > 1 and name not in (index or {})):
            raise RunError(
                f"model.pretrained: {WEIGHT_INDEX} does not fit its weight files: {name} lies in "
                f"{', '.join(sorted(held)) or 'none of them'}, not in {file if file not in held else 'one of them'}.",
                next_step="Fetch the model again, or save it again with save_pretrained.",
            )
        found[name] = held[file]
    return found


def _copy_weights(job: WeightJob, store: Store) -> CopiedWeights:
    with _at_hand(job.file) as file:
        return copy_weights(file, store, job.prefix)


def _read_small(file: SourceFile, store: Store) -> bytes:
    with _at_hand(file) as found:
        return read_small(found, store)


@contextlib.contextmanager
def _at_hand(file: SourceFile) -> Iterator[SourceFile]:
    """A file that can be read by range: the hub's are downloaded first, to this machine's disk."""
    if not file.uri.startswith("hf://"):
        yield file
        return
    from workloads import fetch_hub

    with tempfile.TemporaryDirectory(prefix="headway-hub-") as scratch:
        yield fetch_hub.download(file, Path(scratch))


def _copy_gguf(job: GgufJob, store: Store) -> Contents:
    from workloads.fetch_gguf import convert

    with tempfile.TemporaryDirectory(prefix="headway-gguf-") as scratch:
        original = Path(job.file.uri)
        if job.file.uri.startswith("s3://"):
            original = Path(scratch) / "model.gguf"
            copy_to_disk(job.file, store, original)
        directory = Path(scratch) / "model"
        convert(original, directory, source=job.file.uri)
        converted = list_base(str(directory), store)
        return _copy_files(converted.files, store, job.prefix, one_by_one)


def _is_weights(file: SourceFile) -> bool:
    return file.path.endswith(".safetensors")


def _standing(store: Store, fingerprint: str) -> BaseManifest | None:
    try:
        return read_base(store, fingerprint)
    except NotFound:
        return None


def _discard(store: Store, prefix: str, *, keep: tuple[str, ...] = ()) -> None:
    """Delete what lies under a prefix, unfinished uploads too, but for keys that begin with one of ``keep``.

    What cannot be deleted is left: whoever makes this base later tries again.
    """
    try:
        store.delete([item.key for item in store.list(prefix) if not item.key.startswith(keep)])
        for upload in store.unfinished_uploads(prefix):
            if not upload.key.startswith(keep):
                store.abort_upload(upload)
    except StoreError as e:
        logger.warning("What was copied to %s is left there: %s", store.uri_of(prefix), e)


def _discard_others(store: Store, made: BaseManifest) -> None:
    """Delete what others copied for this base. Whoever still copies cannot commit it any more."""
    keep = (layout.base_manifest(made.fingerprint), made.prefix)
    _discard(store, layout.base(made.fingerprint), keep=keep)
