"""How large a part is, so that S3's limit of parts holds every object that S3 can hold."""

from __future__ import annotations

import pytest

from orchestrator.store.client import PART_BYTES
from orchestrator.store.multipart import MAX_PARTS, part_size

MIB = 2**20


@pytest.mark.parametrize(
    ("size_bytes", "part_bytes"),
    [
        (0, PART_BYTES),
        (MAX_PARTS * PART_BYTES, PART_BYTES),
        (MAX_PARTS * PART_BYTES + 1, PART_BYTES + MIB),
        (5 * 2**40, 525 * MIB),
    ],
)
def test_the_parts_suffice_and_are_whole_mib(size_bytes: int, part_bytes: int) -> None:
    assert part_size(size_bytes) == part_bytes
    assert MAX_PARTS * part_bytes >= size_bytes
