"""Parts that are finished: each is committed by ``parts/00012.json``, which is written after its shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.dataset.format import PartFile
from orchestrator.errors import AlreadyExists, IntegrityError
from orchestrator.spec import canonical_json
from orchestrator.store import Store, layout
from workloads.prepare.once import DELETE
from workloads.prepare.parts import Part, PartJob, batched

_READS = 16


class PartDone(BaseModel):
    """A committed part, as far as the manifest needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    file: PartFile
    part: Part
    """Without its slices, which stand in the file."""
    source_bytes: int
    num_slices: int
    num_reused: int = 0
    """Slices whose samples were taken from an earlier preparation."""


def commit_part(job: PartJob, part: Part, store: Store, *, num_reused: int) -> PartDone:
    """Write a part's file, behind its shards.

    Raises:
        IntegrityError: another file has its name, which is none of this part.
    """
    content = canonical_json(part.model_dump(mode="json", exclude_defaults=True))
    name = layout.part(job.number)
    try:
        store.create(job.prefix + name, content)
    except AlreadyExists:  # by another preparation of the same, from a source that lies elsewhere
        return _found(job, store, sizes=None)
    return _done(job, part, content, num_reused=num_reused)


def committed_parts(jobs: list[PartJob], store: Store) -> Iterator[PartDone]:
    """The parts that an earlier try finished.

    Raises:
        IntegrityError: one of them is damaged.
    """
    if not jobs:
        return
    prefix = jobs[0].prefix
    sizes = {item.key[len(prefix) :]: item.size_bytes for item in store.list(prefix)}
    here = [job for job in jobs if layout.part(job.number) in sizes]
    with ThreadPoolExecutor(_READS) as pool:
        for some in batched(here, _READS):  # of which not more are in memory
            yield from pool.map(lambda job: _found(job, store, sizes=sizes), some)


def _found(job: PartJob, store: Store, *, sizes: dict[str, int] | None) -> PartDone:
    """A part that is there already.

    Nothing recorded its digest yet; the manifest will. It was created in one piece under the fingerprint of its
    source, and is used only where it names this very part (its key is a digest of the settings, the tokenizer and every
    slice with its ETag) and its shards have the sizes that it says. It holds their digests, which readers check.
    """
    key = job.prefix + layout.part(job.number)
    content = store.get(key)
    try:
        part = Part.model_validate_json(content)
    except ValidationError as e:
        raise _damaged(store, key, e.errors()[0]["msg"]) from e
    if part.key != job.key:
        raise _damaged(store, key, "it is of another part")
    for split in part.splits.values():
        shard = split.shard
        if shard is not None and sizes is not None and sizes.get(shard.file) != shard.size_bytes:
            raise _damaged(store, key, f"{shard.file} has {sizes.get(shard.file, 0)} bytes, not {shard.size_bytes}")
    return _done(job, part, content, num_reused=0)


def _done(job: PartJob, part: Part, content: bytes, *, num_reused: int) -> PartDone:
    return PartDone(
        number=job.number,
        file=PartFile(
            file=layout.part(job.number),
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            key=job.key,
        ),
        part=part.model_copy(update={"slices": ()}),
        source_bytes=job.size_bytes,
        num_slices=len(job.slices),
        num_reused=num_reused,
    )


def _damaged(store: Store, key: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{store.uri_of(key)} is not a part of this dataset: {why}.",
        next_step=DELETE,
    )
