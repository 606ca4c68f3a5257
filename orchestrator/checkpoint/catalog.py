"""Which checkpoints of a run are committed. Needs no torch, so the command line can ask."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.checkpoint.format import MAX_MANIFEST_BYTES, Manifest, parse_manifest, unseal
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.store import ObjectInfo, Store, layout

_FOLDER = re.compile(r"step-(\d+)/(\d+)-(\d+)-([0-9a-z]+)/(.+)")
_REREADS = 2
MANIFEST = "manifest.json"
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, order=True)
class Folder:
    """What one group of workers wrote, or was about to write, for one step. Ordered from the oldest to the newest."""

    step: int
    attempt: int
    group: int
    nonce: str
    run_id: str

    @property
    def prefix(self) -> str:
        """Its key in the store, with a slash at the end."""
        return f"{layout.checkpoint(self.run_id, self.step)}{self.name}/"

    @property
    def name(self) -> str:
        return f"{layout.number(self.attempt)}-{layout.number(self.group)}-{self.nonce}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One folder and the objects in it, by name within it."""

    folder: Folder
    objects: dict[str, ObjectInfo]

    @property
    def is_committed(self) -> bool:
        return MANIFEST in self.objects and not self.is_abandoned

    @property
    def is_abandoned(self) -> bool:
        """Whether an empty manifest bars this folder from ever being committed."""
        return MANIFEST in self.objects and self.objects[MANIFEST].size_bytes == 0


def folder_of(run_id: str, key: str) -> tuple[Folder, str] | None:
    """The folder that an object belongs to and its name in it; None for what is in no such folder. Pure."""
    match = _FOLDER.fullmatch(key.removeprefix(layout.checkpoints(run_id)))
    if match is None:
        return None
    step, attempt, group, nonce, name = match.groups()
    folder = Folder(step=int(step), attempt=int(attempt), group=int(group), nonce=nonce, run_id=run_id)
    return (folder, name) if folder.prefix + name == key else None  # a number may be written in other ways


def by_folder(run_id: str, items: Iterable[ObjectInfo]) -> list[Stored]:
    """A listing's folders, newest first. Pure."""
    found: dict[Folder, dict[str, ObjectInfo]] = {}
    for item in items:
        place = folder_of(run_id, item.key)
        if place is not None:
            found.setdefault(place[0], {})[place[1]] = item
    return [Stored(folder=folder, objects=found[folder]) for folder in sorted(found, reverse=True)]


def stored(store: Store, run_id: str) -> list[Stored]:
    """Everything under the run's checkpoints, committed or not, newest first."""
    return by_folder(run_id, store.list(layout.checkpoints(run_id)))


def committed(store: Store, run_id: str) -> list[Folder]:
    """Committed checkpoints, newest step first; of one step, what the newest attempt wrote first."""
    return [found.folder for found in stored(store, run_id) if found.is_committed]


def committed_steps(store: Store, run_id: str) -> list[int]:
    """Steps that have a committed checkpoint, newest first."""
    return list(dict.fromkeys(folder.step for folder in committed(store, run_id)))


def newest_to_commit(store: Store, run_id: str) -> int:
    """The newest attempt that has a committed checkpoint; 0 where none has."""
    return max((folder.attempt for folder in committed(store, run_id)), default=0)


def find(store: Store, run_id: str, step: int) -> Folder:
    """The newest committed checkpoint of a step.

    Raises:
        NotFound: there is none.
    """
    for folder in committed(store, run_id):
        if folder.step == step:
            return folder
    there = ", ".join(str(step) for step in committed_steps(store, run_id)) or "none"
    raise NotFound(f"{run_id} has no committed checkpoint of step {step}.", next_step=f"These steps have one: {there}.")


def read_manifest(store: Store, folder: Folder) -> tuple[Manifest, str]:
    """A committed checkpoint's manifest and the SHA-256 of its bytes.

    Raises:
        IntegrityError: it is damaged. NotFound: not committed.
    """
    key = folder.prefix + MANIFEST

    def read() -> tuple[Manifest, str]:
        data = store.get_range(key, 0, MAX_MANIFEST_BYTES + 1)
        return _parse(store.uri_of(key), data, folder), hashlib.sha256(data).hexdigest()

    return reread(read)


def reread(read: Callable[[], Result]) -> Result:
    """What ``read`` returns; what it finds damaged it reads again, since the wire may have done the damage.

    Raises:
        IntegrityError: it is damaged each time.
    """
    for _ in range(_REREADS):
        try:
            return read()
        except IntegrityError as e:
            logger.warning("Reading it again: %s", e)
    return read()


def _parse(uri: str, data: bytes, folder: Folder) -> Manifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{uri} is larger than {MAX_MANIFEST_BYTES} bytes; no manifest is.")
    manifest = parse_manifest(unseal(data, source=uri), source=uri)
    named = (manifest.run_id, manifest.state.step, manifest.attempt, manifest.group, manifest.nonce)
    if named != (folder.run_id, folder.step, folder.attempt, folder.group, folder.nonce):
        raise IntegrityError(f"{uri} is the manifest of another checkpoint: step {named[1]} of {named[0]}.")
    return manifest


def manifests(store: Store, run_id: str) -> Iterator[tuple[Folder, Manifest | IntegrityError]]:
    """Every committed checkpoint with its manifest, or with what is wrong with it, newest first."""
    for folder in committed(store, run_id):
        try:
            yield folder, read_manifest(store, folder)[0]
        except IntegrityError as e:
            yield folder, e
        except NotFound:
            continue  # retention has deleted it meanwhile
