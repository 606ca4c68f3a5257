"""Editions of a run: the same work done anew, as a run of its own.

A run's id follows from what is to be done, so the same run file gives the same run for ever. ``retrain --fresh`` claims
the next edition under the first one's ``runs/<run-id>/editions/``, and the number becomes part of what the id is made
of. Whoever identifies the run file from then on finds the newest edition.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from orchestrator.errors import AlreadyExists
from orchestrator.store import layout
from orchestrator.store.s3 import Store


def newest_edition(store: Store, first_run_id: str) -> int:
    """The highest edition of the run whose edition 0 is ``first_run_id``."""
    keys = [item.key for item in store.list(layout.editions(first_run_id))]
    return layout.last_number(keys, r"(\d+)\.json")


def claim_edition(store: Store, first_run_id: str, *, after: int, facts: dict[str, Any]) -> int:
    """The edition that follows ``after``: claimed now, or by somebody who wanted the same at the same time.

    So of any number of callers that saw the same edition, all get the same next one.
    """
    following = after + 1
    with suppress(AlreadyExists):
        store.create_json(layout.edition(first_run_id, following), {"claimed_s": time.time(), **facts})
    return following
