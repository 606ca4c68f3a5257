"""The listing of a run's source in S3, kept in the store: ``runs/<run-id>/source.json.gz``.

A source may grow while a job waits in a queue, or before it is started again. The job goes on with the files that were
listed when the run was submitted; their ETags tell whether one was written over.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from contextlib import suppress

from pydantic import TypeAdapter, ValidationError

from orchestrator.dataset.source import SourceFile
from orchestrator.errors import AlreadyExists, NotFound
from orchestrator.store import Store, layout

_FILES = TypeAdapter(tuple[SourceFile, ...])


def keep_listing(store: Store, run_id: str, files: Sequence[SourceFile]) -> None:
    """Keep these unless a listing is kept. Files of this machine are left out: another would not find them."""
    key = layout.run_source(run_id)
    if not files or not files[0].uri.startswith("s3://") or store.exists(key):
        return
    with suppress(AlreadyExists):
        store.create(key, gzip.compress(_FILES.dump_json(tuple(files)), mtime=0))


def kept_listing(store: Store, run_id: str) -> tuple[SourceFile, ...] | None:
    """What is kept; None where nothing is that can be read. Whether it is this run's tells the run's id."""
    try:
        return _FILES.validate_json(gzip.decompress(store.get(layout.run_source(run_id))))
    except (NotFound, ValidationError, gzip.BadGzipFile, zlib.error, EOFError):
        return None
