"""What identifies a run: the fingerprints of its data and of its pretrained model, its code's digest; and its id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.catalog import find
from orchestrator.dataset.format import DatasetManifest, find_dataset
from orchestrator.dataset.source import SourceFile, list_source, source_fingerprint
from orchestrator.errors import NotFound, SpecError
from orchestrator.package import code_digest
from orchestrator.pretrained.source import BaseSource, list_base
from orchestrator.spec import RunSpec, run_id
from orchestrator.store import Store


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    run_id: str
    dataset_fingerprint: str
    code_digest: str
    """Of the working directory's Python files where the task lives there, else empty."""
    files: tuple[SourceFile, ...] = ()
    """The source's files, where the data is to be prepared."""
    dataset: DatasetManifest | None = None
    """The dataset, where the run file names one prepared before."""
    base: BaseSource | None = None
    """The pretrained model that the run file names, not copied yet."""


def identify(spec: RunSpec, store: Store, working_directory: Path) -> RunIdentity:
    """Find out which run this is; what lies in S3 is listed, not read.

    Raises:
        EmptySource, SpecError: there is no such data, no such pretrained model, or no such checkpoint to start from.
        StoreError: the store cannot be reached.
    """
    if spec.model.init_from is not None:
        _require_source(store, *spec.model.init_from_checkpoint())
    base = _list_base(spec, store)
    code = code_digest(working_directory) if spec.user_code else ""
    if spec.data.train is not None:
        files = tuple(list_source(spec.data.train, store))
        fingerprint = source_fingerprint(spec.data, list(files), base.tokenizer_fingerprint if base is not None else "")
        dataset = None
    else:
        files, dataset = (), find_dataset(store, spec.data.dataset or "")
        fingerprint = dataset.fingerprint
    return RunIdentity(
        run_id=run_id(
            spec,
            dataset_fingerprint=fingerprint,
            code_digest=code,
            base_fingerprint=base.fingerprint if base is not None else "",
        ),
        dataset_fingerprint=fingerprint,
        code_digest=code,
        files=files,
        dataset=dataset,
        base=base,
    )


def _list_base(spec: RunSpec, store: Store) -> BaseSource | None:
    if spec.model.pretrained is None:
        return None
    return list_base(spec.model.pretrained, store, trust_remote_code=spec.model.trust_remote_code)


def _require_source(store: Store, run_id: str, step: int) -> None:
    try:
        find(store, run_id, step)
    except NotFound as e:
        raise SpecError(
            f"model.init_from: {e.message}", next_step=e.next_step or f"See: headway list checkpoints {run_id}"
        ) from e
