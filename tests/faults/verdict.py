"""What must hold whatever went wrong: one judge of all injections.

``Watch`` lists a run's checkpoints over and over, past the proxy, and remembers each as it was when it was first seen
committed. ``judge`` compares what is there in the end with that and with what the writers were told.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.checkpoint.catalog import Folder, Stored, stored
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import IntegrityError, NotFound, StoreError
from orchestrator.store import ObjectInfo, Store
from tests.faults.ranks import KEEP, num_wrong_in_store
from tests.unit.checkpoint.saving import RUN

_LOOK_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How often it happened that must never happen."""

    torn_accepted: int = 0
    """Checkpoints that a reader takes, and whose bytes are not those of their step."""
    committed_lost: int = 0
    """Committed checkpoints that are gone or damaged, or that a resume passed over, without retention's right."""
    wrong_bytes: int = 0
    """Elements that a resume filled with another value than their step's."""
    overwritten: int = 0
    """Objects of committed checkpoints that were written again."""

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            torn_accepted=self.torn_accepted + other.torn_accepted,
            committed_lost=self.committed_lost + other.committed_lost,
            wrong_bytes=self.wrong_bytes + other.wrong_bytes,
            overwritten=self.overwritten + other.overwritten,
        )


class Watch:
    """Looks at the run's checkpoints from its start to its end."""

    def __init__(self, store: Store) -> None:
        self.committed: dict[Folder, dict[str, ObjectInfo]] = {}
        """Every folder that was ever seen committed, with its objects as they were then."""
        self.overwritten: set[str] = set()
        """Keys of objects of theirs that were another object later."""
        self._store = store
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def look(self) -> list[Stored]:
        """What is there now."""
        with self._lock:
            found = stored(self._store, RUN)
            # One that retention deletes ends with its manifest; what happens to the rest is no longer of interest, and
            # whether it was right to delete it is asked in the end.
            for item in (item for item in found if item.is_committed):
                if item.folder in self.committed:
                    self.overwritten |= set(_changed(self.committed[item.folder], item))
                else:
                    self.committed[item.folder] = dict(item.objects)
            return found

    def _run(self) -> None:
        while not self._ending.wait(_LOOK_EVERY_S):
            try:
                self.look()
            except StoreError:
                continue  # the server is down, as it may be


def _changed(before: dict[str, ObjectInfo], item: Stored) -> Iterable[str]:
    return (
        item.objects[name].key for name in before.keys() & item.objects.keys() if item.objects[name] != before[name]
    )


def judge(store: Store, watch: Watch, acknowledged: set[Folder]) -> Verdict:
    """The verdict on what is in the store once all is quiet.

    Args:
        acknowledged: checkpoints that a rank 0 was told are committed.
    """
    there = {item.folder for item in watch.look() if item.is_committed}
    torn, damaged = 0, set()
    for folder in there:
        try:
            verify(store, folder)
            torn += num_wrong_in_store(store, folder) > 0
        except (IntegrityError, NotFound):
            damaged.add(folder)
    ever = set(watch.committed) | acknowledged
    lost = {folder for folder in ever if folder not in there - damaged and not may_be_gone(folder, ever)}
    return Verdict(torn_accepted=torn, committed_lost=len(lost), overwritten=len(watch.overwritten))


def may_be_gone(folder: Folder, ever: set[Folder]) -> bool:
    """Whether retention had the right to delete it: enough newer steps, or its step again by a newer group. Pure."""
    newer_steps = {other.step for other in ever if other.step > folder.step}
    replaced = any(other.step == folder.step and other > folder for other in ever)
    return len(newer_steps) >= KEEP or replaced
