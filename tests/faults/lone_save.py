"""One save by one rank, in a process whose clock may be wrong. Prints what became of it, as JSON.

python -m tests.faults.lone_save s3://bucket/prefix STEP KEEP
"""

from __future__ import annotations

import json
import sys
import time

from orchestrator.errors import HeadwayError
from orchestrator.store import open_store
from orchestrator.store.s3 import PROMPT
from tests.faults.ranks import SMALL_TABLE, KnownState
from tests.unit.checkpoint.saving import finish, new_group, writer_of
from tests.unit.checkpoint.states import scalars


def main(uri: str, step: int, keep: int) -> str:
    """Its error, empty where it committed."""
    store = open_store(uri, patience=PROMPT)
    known = KnownState(rank=0, world_size=1, table_bytes=SMALL_TABLE)
    known.fill(step)
    try:
        writer = writer_of(store, new_group(store), known.tensors, module=known.module, keep=keep, retry_s=0.1)
        writer.save(scalars(step))
        error = finish(writer).error
    except HeadwayError as e:
        error = e
    return f"{type(error).__name__}: {error}" if error else ""


if __name__ == "__main__":
    print(json.dumps({"error": main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), "clock_s": time.time()}))
