"""A source to a prepared dataset: one part of the source per Ray task, in a fixed cut.

The cut into parts depends on the source alone, so the same source gives the same shards at any parallelism. Each part
is committed when it is done, so a preparation that was killed goes on where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import BaseModel

from orchestrator.dataset.format import DatasetManifest, Tokenizer, is_held_out, read_manifest
from orchestrator.dataset.given import GivenTokenizer, read_given
from orchestrator.dataset.source import SourceFile, source_fingerprint
from orchestrator.errors import AlreadyExists, NotFound, RunError, SpecError
from orchestrator.runs import RunIdentity
from orchestrator.spec import DataSpec, RunSpec
from orchestrator.store import Store, layout
from workloads.prepare.assemble import Gathered, assemble, require_good
from workloads.prepare.cluster import on_cluster
from workloads.prepare.committed import PartDone, commit_part, committed_parts
from workloads.prepare.cutting import MAX_PART_BYTES, cut, part_bytes, slices_of
from workloads.prepare.labels import class_names, labels_part, scan_part
from workloads.prepare.messages import messages_part
from workloads.prepare.parts import Part, PartJob, settings_digest
from workloads.prepare.progress import Progress
from workloads.prepare.reuse import find_earlier, take_part, with_earlier
from workloads.prepare.streams import stream_part
from workloads.prepare.vocabulary import store_given, store_pretrained, store_trained

if TYPE_CHECKING:
    from workloads.tasks.base_context import BaseContext

__all__ = ["part_jobs", "prepare", "prepare_identified", "prepare_part", "split_by_record"]

Result = TypeVar("Result", bound=BaseModel)


class RunParts(Protocol):
    """Does work on each part, and gives the results as they are finished."""

    def __call__(self, work: Callable[[PartJob, Store], Result], jobs: Sequence[PartJob]) -> Iterator[Result]: ...


def prepare(
    data: DataSpec,
    name: str,
    files: list[SourceFile],
    store: Store,
    *,
    base: BaseContext | None = None,
    tokenizer_fingerprint: str = "",
    tokenizer: GivenTokenizer | None = None,
    say: Callable[[str], None] = lambda text: None,
    run: RunParts = on_cluster,
) -> DatasetManifest:
    """The prepared dataset of this source; made where it does not exist yet.

    Args:
        base: the pretrained model, whose tokenizer and chat template are taken; None trains a tokenizer.
        tokenizer_fingerprint: of that tokenizer's files.
        tokenizer: the one that ``data.tokenizer`` names, where it has been read already.
        say: told how far it is.
        run: how the parts are worked on.

    Raises:
        AttemptFailed: too much of the source is bad. RunError: a split is empty, or the classes are not some to learn.
        SpecError: the tokenizer is missing, or lacks what the data needs.
        IntegrityError: what an earlier try has left of this dataset is damaged.
    """
    given = tokenizer or read_given(data, store)
    wanted = source_fingerprint(data, files, given.fingerprint if given is not None else tokenizer_fingerprint)
    standing = _standing(data, name, wanted, store)
    if standing is not None:
        return standing
    chosen = [file for file in files if not file.left_out]
    by_record = split_by_record(data, chosen)
    prefix = layout.dataset(name, wanted)
    kept = _keep_tokenizer(data, chosen, store, prefix, base, given, by_record=by_record)
    jobs = _with_classes(part_jobs(data, chosen, store, prefix, kept, by_record=by_record), data, run)
    settings = settings_digest(data, by_record=by_record)
    earlier = find_earlier(store, name, settings=settings, tokenizer=kept, but=wanted)
    gathered = Gathered(len(jobs[0].classes) or kept.vocab_size)
    _gather(jobs, gathered, store, earlier, run, Progress(jobs, say))
    manifest = assemble(
        data,
        name,
        wanted,
        chosen,
        gathered,
        kept,
        jobs[0].classes,
        by_record=by_record,
        reused=earlier.fingerprint if earlier is not None and any(one.num_reused for one in gathered.parts) else None,
        left_out=Counter(file.left_out for file in files if file.left_out),
    )
    try:
        store.create_json(layout.dataset_manifest(name, wanted), manifest.model_dump(mode="json"))
    except AlreadyExists:  # prepared by someone else meanwhile: the same bytes under the same fingerprint
        return read_manifest(store, name, wanted)
    return manifest


def prepare_identified(
    spec: RunSpec,
    identity: RunIdentity,
    store: Store,
    *,
    base: BaseContext | None,
    say: Callable[[str], None],
) -> DatasetManifest:
    """:func:`prepare` for what the run file's ``data.train`` was found to be."""
    return prepare(
        spec.data,
        spec.name,
        list(identity.files),
        store,
        base=base,
        tokenizer_fingerprint=identity.base.tokenizer_fingerprint if identity.base is not None else "",
        tokenizer=identity.tokenizer,
        say=say,
    )


def _standing(data: DataSpec, name: str, wanted: str, store: Store) -> DatasetManifest | None:
    """The dataset where it is prepared already, held to the limits of now."""
    try:
        manifest = read_manifest(store, name, wanted)
    except NotFound:
        return None
    require_good(data, manifest)
    return manifest


def _with_classes(jobs: list[PartJob], data: DataSpec, run: RunParts) -> list[PartJob]:
    """The jobs, told of labelled texts which classes all of the source holds."""
    if data.kind != "labelled":
        return jobs
    classes = class_names(list(run(scan_part, jobs)), data.label_field or "")
    return [job.model_copy(update={"classes": classes}) for job in jobs]


def _gather(
    jobs: list[PartJob],
    gathered: Gathered,
    store: Store,
    earlier: DatasetManifest | None,
    run: RunParts,
    progress: Progress,
) -> None:
    """Every part: those that an earlier try has finished, and the others once they are made."""
    for found in committed_parts(jobs, store):
        gathered.add(found)
        progress.found(found)
    missing = [job for job in jobs if job.number not in gathered]
    if earlier is not None:
        missing = with_earlier(missing, earlier, store)
    for made in run(prepare_part, missing):
        gathered.add(made)
        progress.made(made)
    progress.end()


def _keep_tokenizer(
    data: DataSpec,
    files: list[SourceFile],
    store: Store,
    prefix: str,
    base: BaseContext | None,
    given: GivenTokenizer | None,
    *,
    by_record: bool,
) -> Tokenizer:
    """The dataset's tokenizer, in the store."""
    if data.kind == "packed" and base is None:
        raise SpecError(
            "data.format: messages needs the chat template of a pretrained model.",
            next_step="Set model.pretrained to one made for chat.",
        )
    if given is not None:
        return store_given(given, store, prefix)
    if base is not None:
        return store_pretrained(data, base.directory, store, prefix, trust_remote_code=base.trust_remote_code)
    return store_trained(data, files, store, prefix, by_record=by_record)


def split_by_record(data: DataSpec, files: list[SourceFile]) -> bool:
    """Whether the held-out split is of records: of conversations and labelled texts always, and of one file's texts.

    Raises:
        RunError: it is of files, and one of the splits gets none.
    """
    if data.kind != "stream" or (data.format in ("jsonl", "parquet") and len(files) == 1):
        return True
    num_held_out = sum(is_held_out(file.path, data.eval_fraction) for file in files)
    if num_held_out in (0, len(files)):
        raise RunError(
            f"data: of {len(files)} files {num_held_out} fall into the held-out split "
            f"(eval_fraction {data.eval_fraction}); both splits need at least one.",
            next_step="Use more files, or another data.eval_fraction.",
        )
    return False


def part_jobs(
    data: DataSpec, files: list[SourceFile], store: Store, prefix: str, tokenizer: Tokenizer, *, by_record: bool
) -> list[PartJob]:
    """The work on each part of the source, in order."""
    of_16_bits = data.kind == "stream" and tokenizer.vocab_size <= 2**16
    usual_bytes = part_bytes(
        sum(file.size_bytes for file in files), max_bytes=MAX_PART_BYTES if of_16_bits else MAX_PART_BYTES // 2
    )
    return [
        PartJob(
            number=number,
            slices=tuple(part),
            data=data,
            store=store.uri,
            prefix=prefix,
            tokenizer=tokenizer,
            by_record=by_record,
        )
        for number, part in enumerate(cut(slices_of(files, data), usual_bytes))
    ]


def prepare_part(job: PartJob, store: Store) -> PartDone:
    """Tokenize one part of the source, write its shards, and commit it."""
    part, num_reused = _made_part(job, store)
    return commit_part(job, part, store, num_reused=num_reused)


def _made_part(job: PartJob, store: Store) -> tuple[Part, int]:
    """The part, and how many of its slices were taken from an earlier preparation."""
    if job.data.kind == "stream":
        return stream_part(job, store)
    taken = take_part(job, store)
    if taken is not None:
        return taken, len(job.slices)
    return (messages_part if job.data.kind == "packed" else labels_part)(job, store), 0
