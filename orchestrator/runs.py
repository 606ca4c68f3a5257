"""What identifies a run: the fingerprints of its data and of its pretrained model, its code's digest; and its id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checkpoint.catalog import find
from orchestrator.dataset.format import DatasetManifest, find_dataset, read_manifest
from orchestrator.dataset.given import GivenTokenizer, read_given
from orchestrator.dataset.listing import kept_listing
from orchestrator.dataset.source import SourceFile, list_source, require_documents_that_fit, source_fingerprint
from orchestrator.errors import IntegrityError, NotFound, RunError, SpecError
from orchestrator.package import code_digest
from orchestrator.pretrained.format import read_base
from orchestrator.pretrained.source import BaseSource, list_base
from orchestrator.spec import RunSpec, run_id
from orchestrator.store import Store, layout
from orchestrator.store.editions import newest_edition


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    run_id: str
    edition: int = 0
    """Above 0 where ``retrain --fresh`` had the same done anew (store/editions.py)."""
    first: RunIdentity | None = None
    """Of edition 0, where this is a later one."""
    dataset_fingerprint: str
    code_digest: str
    """Of the working directory's Python files where the task lives there, else empty."""
    files: tuple[SourceFile, ...] = ()
    """The source's files, where the data is to be prepared."""
    dataset: DatasetManifest | None = None
    """The dataset, where the run file names one prepared before, or an earlier attempt has prepared it."""
    base: BaseSource | None = None
    """The pretrained model that the run file names, not copied yet."""
    tokenizer: GivenTokenizer | None = None
    """What ``data.tokenizer`` names."""


def identify(
    spec: RunSpec,
    store: Store,
    working_directory: Path,
    *,
    edition: int | None = None,
    listed: Sequence[SourceFile] | None = None,
) -> RunIdentity:
    """Find out which run this is; what lies in S3 is listed, not read, but for a tokenizer that is given.

    Args:
        edition: None is the newest that the store knows.
        listed: the files of ``data.train``, where they were listed before.

    Raises:
        EmptySource, SpecError: there is no such data, no such pretrained model, or no such checkpoint to start from.
        StoreError: the store cannot be reached.
    """
    if spec.model.init_from is not None:
        _require_source(store, *spec.model.init_from_checkpoint())
    base = _list_base(spec, store)
    tokenizer = read_given(spec.data, store)
    code = code_digest(working_directory) if spec.user_code else ""
    if spec.data.train is not None:
        found = list_source(spec.data.train, store, tree=spec.data.format == "source") if listed is None else listed
        files = tuple(found)
        require_documents_that_fit(spec.data, files)
        fingerprint = source_fingerprint(spec.data, list(files), _tokenizer_fingerprint(base, tokenizer))
        dataset = None
    else:
        files, dataset = (), find_dataset(store, spec.data.dataset or "")
        fingerprint = dataset.fingerprint
    first = RunIdentity(
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
        tokenizer=tokenizer,
    )
    return in_edition(first, spec, newest_edition(store, first.run_id) if edition is None else edition)


def identity_of(begun: str, spec: RunSpec, store: Store, working_directory: Path, *, edition: int) -> RunIdentity:
    """The identity of a run that was submitted as ``begun``, for whoever goes on with it later.

    A source may have grown meanwhile, or be gone. What an earlier attempt has brought into the store is taken from
    there. Of a source in S3 the files are those of the listing that was kept. All else has to be as it was.

    Raises:
        RunError: it is not. What :func:`identify` raises.
    """
    standing = _in_store(begun, spec, store, working_directory, edition)
    if standing is not None:
        return standing
    found = identify(spec, store, working_directory, edition=edition, listed=kept_listing(store, begun))
    if found.run_id != begun:
        raise RunError(
            f"{begun} cannot be made any more: what its run file names has changed since it was submitted, and was not "
            "in the store yet.",
            next_step="Submit the run file again: what is there now makes another run.",
        )
    return found


def _in_store(begun: str, spec: RunSpec, store: Store, working_directory: Path, edition: int) -> RunIdentity | None:
    """The identity by what an earlier attempt recorded, where its dataset and its pretrained model are in the store."""
    code = code_digest(working_directory) if spec.user_code else ""
    name = spec.name if spec.data.train is not None else (spec.data.dataset or "").partition("@")[0]
    base = None
    try:
        recorded = store.get_json(layout.run_spec(begun))
        dataset = read_manifest(store, name, recorded["dataset_fingerprint"])
        if spec.model.pretrained is not None:
            manifest = read_base(store, recorded["base_fingerprint"])
            base = BaseSource(uri=manifest.uri, fingerprint=manifest.fingerprint, tokenizer_fingerprint="", files=())
    except (NotFound, IntegrityError, KeyError, TypeError):  # identify() finds what is wrong, if anything is
        return None
    first = RunIdentity(
        run_id=run_id(
            spec,
            dataset_fingerprint=dataset.fingerprint,
            code_digest=code,
            base_fingerprint=base.fingerprint if base is not None else "",
        ),
        dataset_fingerprint=dataset.fingerprint,
        code_digest=code,
        dataset=dataset,
        base=base,
    )
    found = in_edition(first, spec, edition)
    return found if found.run_id == begun else None


def in_edition(first: RunIdentity, spec: RunSpec, edition: int) -> RunIdentity:
    """The same as a run of its own: another edition of the run whose edition 0 is ``first``. Pure."""
    if edition == 0:
        return first
    made_of = {
        "dataset_fingerprint": first.dataset_fingerprint,
        "code_digest": first.code_digest,
        "base_fingerprint": first.base.fingerprint if first.base is not None else "",
    }
    return replace(first, run_id=run_id(spec, **made_of, edition=edition), edition=edition, first=first)


def _tokenizer_fingerprint(base: BaseSource | None, given: GivenTokenizer | None) -> str:
    if given is not None:
        return given.fingerprint
    return base.tokenizer_fingerprint if base is not None else ""


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
