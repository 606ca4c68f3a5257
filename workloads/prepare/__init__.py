"""A source to a prepared dataset, through Ray Data: one part of the source per task, in a fixed cut.

The cut into parts depends on the source alone, so the same source gives the same shards at any parallelism.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from orchestrator.dataset.format import DatasetManifest, Tokenizer, is_held_out, read_manifest
from orchestrator.dataset.source import SourceFile, source_fingerprint
from orchestrator.errors import AlreadyExists, NotFound, RunError, SpecError
from orchestrator.spec import DataSpec
from orchestrator.store import Store, layout, open_store
from workloads.prepare.assemble import assemble
from workloads.prepare.labels import Classes, class_names, labels_part, scan_part
from workloads.prepare.messages import messages_part
from workloads.prepare.parts import Part, PartJob, cut, slices_of
from workloads.prepare.streams import stream_part
from workloads.prepare.vocabulary import store_pretrained, store_trained

if TYPE_CHECKING:
    from workloads.tasks.base_context import BaseContext

__all__ = ["part_jobs", "prepare", "prepare_part", "split_by_record"]

_PART = {"stream": stream_part, "packed": messages_part, "labelled": labels_part}

Result = TypeVar("Result", bound=BaseModel)


def prepare(
    data: DataSpec,
    name: str,
    files: list[SourceFile],
    store: Store,
    *,
    base: BaseContext | None = None,
    tokenizer_fingerprint: str = "",
) -> DatasetManifest:
    """The prepared dataset of this source; made where it does not exist yet.

    Args:
        base: the pretrained model, whose tokenizer and chat template are taken; None trains a tokenizer.
        tokenizer_fingerprint: of that tokenizer's files.

    Raises:
        RunError: too much of the source is bad, a split is empty, or the classes are not some to learn.
        SpecError: the tokenizer is missing, or lacks what the data needs.
    """
    wanted = source_fingerprint(data, files, tokenizer_fingerprint)
    try:
        return read_manifest(store, name, wanted)
    except NotFound:
        pass
    if data.kind == "packed" and base is None:
        raise SpecError(
            "data.format: messages needs the chat template of a pretrained model.",
            next_step="Set model.pretrained to one made for chat.",
        )
    by_record = split_by_record(data, files)
    prefix = layout.dataset(name, wanted)
    if base is None:
        tokenizer = store_trained(data, files, store, prefix, by_record=by_record)
    else:
        tokenizer = store_pretrained(data, base.directory, store, prefix, trust_remote_code=base.trust_remote_code)
    jobs = part_jobs(data, files, store, prefix, tokenizer, by_record=by_record)
    classes: tuple[str, ...] = ()
    if data.kind == "labelled":
        classes = class_names(on_cluster(scan_part, jobs, Classes), data.label_field or "")
        jobs = [job.model_copy(update={"classes": classes}) for job in jobs]
    manifest = assemble(data, name, wanted, files, on_cluster(prepare_part, jobs, Part), tokenizer, classes)
    try:
        store.create_json(layout.dataset_manifest(name, wanted), manifest.model_dump(mode="json"))
    except AlreadyExists:  # prepared by someone else meanwhile: the same bytes under the same fingerprint
        return read_manifest(store, name, wanted)
    return manifest


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
        for number, part in enumerate(cut(slices_of(files, data)))
    ]


def prepare_part(job: PartJob, store: Store) -> Part:
    """Tokenize one part of the source, write its shards, and tell what was written."""
    return _PART[job.data.kind](job, store)


def on_cluster(work: Callable[[PartJob, Store], Result], jobs: list[PartJob], result: type[Result]) -> list[Result]:
    """``work`` on every part, each as a Ray Data task; the results in the parts' order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"part": job.number, "job": job.model_dump_json()} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = dataset.map(_work_row, fn_args=[work], num_cpus=1).take_all()
    return [result.model_validate_json(row["result"]) for row in sorted(done, key=lambda row: row["part"])]


def _work_row(row: dict[str, Any], work: Callable[[PartJob, Store], BaseModel]) -> dict[str, Any]:
    job = PartJob.model_validate_json(row["job"])
    return {"part": row["part"], "result": work(job, open_store(job.store)).model_dump_json()}
