"""A full disk under the S3 server: said, survived, and written to again once there is room."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.catalog import committed_steps, find
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import StoreError
from orchestrator.store import Store
from orchestrator.store.s3 import new_client
from tests.faults.ranks import SMALL_TABLE, KnownState
from tests.faults.yard import PATIENT, Yard
from tests.small_disk import small_disk
from tests.unit.checkpoint.saving import RUN, finish, new_group, writer_of
from tests.unit.checkpoint.states import scalars

DISK_BYTES = 96 * 2**20


@pytest.fixture
def small_yard(tmp_path: Path) -> Iterator[Yard]:
    """A server whose data lie on a disk of ``DISK_BYTES``."""
    with small_disk(tmp_path, DISK_BYTES):
        yard = Yard(tmp_path)
        try:
            yield yard
        finally:
            yard.close()


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / f"filler-{secrets.token_hex(4)}"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(DISK_BYTES))
    return filler


def test_a_full_disk_under_the_server_costs_a_save_and_no_more(small_yard: Yard, tmp_path: Path) -> None:
    place = small_yard.new_store()
    # A disk that is full stays so, however often it is asked.
    store = Store(place.bucket, place.prefix, client=new_client(replace(PATIENT, attempts=2), small_yard.settings))
    known = KnownState(rank=0, world_size=1, table_bytes=SMALL_TABLE)
    writer = writer_of(store, new_group(store), known.tensors, module=known.module, retry_s=0.1)
    known.fill(1)
    writer.save(scalars(1))
    assert writer.wait().error is None  # type: ignore[union-attr]

    filler = fill(tmp_path)
    known.fill(2)
    writer.save(scalars(2))
    failed = writer.wait()
    assert failed is not None
    assert isinstance(failed.error, StoreError)
    assert (writer.counts.committed, writer.counts.failed) == (1, 1)
    verify(store, find(store, RUN, 1))
    assert committed_steps(store, RUN) == [1]

    filler.unlink()
    known.fill(3)
    writer.save(scalars(3))
    assert finish(writer).error is None
    assert committed_steps(store, RUN) == [3, 1]
    for step in (3, 1):
        verify(store, find(store, RUN, step))
