"""What stays of a run's checkpoints, and what goes.

A folder that its writers will never commit is barred first: an empty ``manifest.json`` takes the name, so that a
process which was frozen just before its commit cannot commit after its files are gone. A folder is deleted manifest
first, so that none is ever half there. A reader, or a version, pins what it needs:
``step-00000100/pins/<name>.json``. All times are the S3 server's own, so a wrong clock here deletes nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.checkpoint.catalog import MANIFEST, Folder, Stored, by_folder, folder_of
from orchestrator.errors import AlreadyExists, HeadwayError, IntegrityError, NotFound
from orchestrator.store import ObjectInfo, Store, WorkerGroup, layout
from orchestrator.store.attempts import ensure_newest_group

logger = logging.getLogger(__name__)
READER_S = 24 * 3600.0
"""How long the pin of a reader holds that never took it away."""


def pin(store: Store, run_id: str, step: int, name: str, *, reason: str, for_s: float | None = None) -> None:
    """Keep every checkpoint of a step from retention; for good unless ``for_s`` is given. Again is the same as once."""
    try:
        store.create_json(f"{layout.checkpoint_pins(run_id, step)}{name}.json", {"reason": reason, "for_s": for_s})
    except AlreadyExists:
        return


def unpin(store: Store, run_id: str, step: int, name: str) -> None:
    store.delete([f"{layout.checkpoint_pins(run_id, step)}{name}.json"])


@contextmanager
def pinned(store: Store, folder: Folder, *, reason: str) -> Iterator[None]:
    """A pin for as long as a reader reads. A store that lets us read but not write is read without."""
    name = f"reader-{secrets.token_hex(4)}"
    try:
        pin(store, folder.run_id, folder.step, name, reason=reason, for_s=READER_S)
    except HeadwayError as e:
        logger.warning("The checkpoint of step %d cannot be pinned while it is read: %s", folder.step, e)
        yield
        return
    try:
        yield
    finally:
        try:
            unpin(store, folder.run_id, folder.step, name)
        except HeadwayError as e:  # it ends by itself, and what was read is good
            logger.warning("The pin of a reader of step %d stays for a day: %s", folder.step, e)


def retire(store: Store, group: WorkerGroup, *, keep: int, just_committed: Folder) -> None:
    """Delete what the newest commit makes superfluous. Called by rank 0 of ``group`` after each commit.

    Goes: committed checkpoints of steps beyond the ``keep`` newest, and others of the very step just committed, unless
    their step is pinned; what this group and older ones left uncommitted. Stays: all that newer attempts and groups
    wrote, and what this group writes for later steps, which other ranks may be at already.

    Raises:
        Fenced: a newer attempt or group has taken over; nothing more is deleted.
    """
    listing = list(store.list(layout.checkpoints(group.run_id)))
    found = by_folder(group.run_id, listing)
    kept = _kept_steps(found, keep=keep, just_committed=just_committed)
    pinned = _pinned_steps(store, group.run_id, listing, now_s=_server_time(found, just_committed))
    going = [
        item
        for item in found
        if is_superfluous(item, group, kept_steps=kept, pinned_steps=pinned, just_committed=just_committed)
    ]
    for item in going:
        ensure_newest_group(store, group)
        _remove(store, item)


def is_superfluous(
    item: Stored, group: WorkerGroup, *, kept_steps: set[int], pinned_steps: set[int], just_committed: Folder
) -> bool:
    """Whether a folder may go. Pure."""
    folder = item.folder
    if folder == just_committed or _is_newer(folder, group):
        return False
    if item.is_committed:
        is_kept = folder.step in kept_steps and folder.step != just_committed.step
        return not is_kept and folder.step not in pinned_steps
    if item.is_abandoned and len(item.objects) == 1:
        return False  # all that is left is the bar, and that has to stay
    return _is_older(folder, group) or folder.step < just_committed.step


def abort_unfinished_uploads(store: Store, group: WorkerGroup) -> int:
    """Abort multipart uploads that older attempts and groups left behind; S3 bills them and lists them nowhere."""
    aborted = 0
    for upload in store.unfinished_uploads(layout.checkpoints(group.run_id)):
        place = folder_of(group.run_id, upload.key)
        if place is not None and _is_older(place[0], group):
            store.abort_upload(upload)
            aborted += 1
    return aborted


def _remove(store: Store, item: Stored) -> None:
    prefix = item.folder.prefix
    if item.is_committed:
        store.delete([prefix + MANIFEST])
    elif not item.is_abandoned:
        try:
            store.create(prefix + MANIFEST, b"")
        except AlreadyExists:
            return  # committed at the last moment: not ours to touch
    store.delete(prefix + name for name in item.objects if name != MANIFEST)


def _kept_steps(found: list[Stored], *, keep: int, just_committed: Folder) -> set[int]:
    """The newest up to the one just committed, and all beyond it.

    What lies beyond was passed over when this group resumed. It may be damaged, and takes no place of a good one.
    """
    steps = {item.folder.step for item in found if item.is_committed} | {just_committed.step}
    reached = sorted((step for step in steps if step <= just_committed.step), reverse=True)
    return {*reached[:keep], *(step for step in steps if step > just_committed.step)}


def _pinned_steps(store: Store, run_id: str, listing: list[ObjectInfo], *, now_s: float) -> set[int]:
    pinned = set()
    root = layout.checkpoints(run_id)
    for item in listing:
        step, _, rest = item.key.removeprefix(root).partition("/")
        is_pin = rest.startswith("pins/") and step.removeprefix("step-").isdecimal()
        if not is_pin:
            continue
        if _holds(store, item, now_s=now_s):
            pinned.add(int(step.removeprefix("step-")))
        else:
            store.delete([item.key])
    return pinned


def _holds(store: Store, item: ObjectInfo, *, now_s: float) -> bool:
    try:
        value: dict[str, Any] = store.get_json(item.key)
        return value["for_s"] is None or item.modified_s + value["for_s"] > now_s
    except NotFound:
        return False
    except (IntegrityError, KeyError, TypeError, RecursionError):
        return True  # nobody can say how long: keep


def _server_time(found: list[Stored], just_committed: Folder) -> float:
    times = [i.objects[MANIFEST].modified_s for i in found if i.folder == just_committed and MANIFEST in i.objects]
    return max(times, default=0.0)


def _claim(folder: Folder) -> tuple[int, int]:
    return folder.attempt, folder.group


def _is_older(folder: Folder, group: WorkerGroup) -> bool:
    return _claim(folder) < (group.attempt.number, group.number)


def _is_newer(folder: Folder, group: WorkerGroup) -> bool:
    return _claim(folder) > (group.attempt.number, group.number)
