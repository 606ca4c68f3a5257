"""Versions: ``models/<model>/versions/00001/``, a Hugging Face directory and what it came from.

``claim.json`` claims the number before any file is written; ``version.json`` is written last and lists every
file with its digest. The version exists when ``version.json`` exists.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.spec import canonical_json
from orchestrator.store import layout
from orchestrator.store.s3 import Store

FORMAT: Literal["headway/version/1"] = "headway/version/1"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_OWN_FILES = frozenset({"claim.json", "version.json"})


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionFile(_Frozen):
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CheckpointSource(_Frozen):
    uri: str
    step: int


class DatasetSource(_Frozen):
    name: str
    fingerprint: str


class Version(_Frozen):
    """``version.json``: an exported model and where it came from."""

    format: Literal["headway/version/1"] = FORMAT
    model: str
    number: Annotated[int, Field(ge=1)]
    task: str
    run_id: str
    attempt: int
    checkpoint: CheckpointSource
    dataset: DatasetSource
    code_digest: str
    evaluation: dict[str, Any]
    gate: dict[str, Any]
    files: Annotated[dict[str, VersionFile], Field(min_length=1)]
    base: BaseReference | None = None
    """The pretrained weights without which the files are no model: they hold an adapter alone."""
    created_s: float
    nonce: str

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, VersionFile]) -> dict[str, VersionFile]:
        check_names(files)
        return files

    def document(self) -> dict[str, Any]:
        """The version as it is stored. A whole model says nothing of a base, so that older readers take it."""
        return self.model_dump(mode="json", exclude={"base"} if self.base is None else set())

    @property
    def name(self) -> str:
        """``MODEL@N``, as people write it."""
        return f"{self.model}@{self.number}"

    @property
    def digest(self) -> str:
        return files_digest(self.files)


def files_digest(files: Mapping[str, VersionFile]) -> str:
    """32 hex digits of the files' names and contents."""
    return hashlib.sha256(canonical_json({name: file.sha256 for name, file in files.items()})).hexdigest()[:32]


def check_names(names: Mapping[str, object]) -> None:
    """The files of a version lie side by side, so a name that leads elsewhere is an attack or a fault.

    Raises:
        ValueError: a name that is not a plain file name.
    """
    for name in names:
        if not _FILE_NAME.fullmatch(name) or name in _OWN_FILES:
            raise ValueError(f"{name[:100]!r} is not a plain file name of a model's directory")


def claim_version(store: Store, model: str, *, facts: dict[str, Any]) -> int:
    """Claim the next number of ``model``, before any of its files is written.

    ``facts`` say who claims (``run_id``, ``attempt``); :func:`publish` holds the version against them.
    """
    claimed = [int(name) for name in store.list_folders(layout.versions(model)) if name.isdecimal()]
    value = {"nonce": secrets.token_hex(8), "claimed_s": time.time(), **facts}
    return store.create_numbered(max(claimed, default=0), lambda number: layout.version_claim(model, number), value)


def publish(store: Store, version: Version) -> None:
    """Make the version exist. Its files must be in the store by now. The same one twice is no error.

    Raises:
        AlreadyExists: another version has this number.
        IntegrityError: the number was never claimed, or by another run.
    """
    claim_key = layout.version_claim(version.model, version.number)
    try:
        claim = store.get_json(claim_key)
    except NotFound as e:
        raise IntegrityError(
            f"{version.name} cannot be published: {store.uri_of(claim_key)} does not exist.",
            next_step="Claim the number first.",
        ) from e
    owner = claim.get("run_id", version.run_id) if isinstance(claim, dict) else None
    if owner != version.run_id:
        raise IntegrityError(f"{version.name} cannot be published by run {version.run_id}: {owner} claimed it.")
    store.create_json(layout.version_manifest(version.model, version.number), version.document())


def read_version(store: Store, model: str, number: int) -> Version:
    """
    Raises:
        NotFound: no such version. IntegrityError: its ``version.json`` is not one, or is another's.
    """
    key = layout.version_manifest(model, number)
    try:
        version = Version.model_validate(store.get_json(key))
    except (ValidationError, RecursionError) as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a {FORMAT} document: {first_fault(e)}.") from e
    if (version.model, version.number) != (model, number):
        raise IntegrityError(f"{store.uri_of(key)} says that it is {version.name}.")
    return version


def list_versions(store: Store, model: str) -> list[Version]:
    """The published versions, oldest first. Numbers that were only claimed are left out."""
    found = []
    for number in sorted(int(name) for name in store.list_folders(layout.versions(model)) if name.isdecimal()):
        try:
            found.append(read_version(store, model, number))
        except NotFound:
            continue
    return found


def first_fault(error: Exception) -> str:
    """The first fault that pydantic found, as ``field: what``."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part)[:100] for part in fault["loc"]) or "document"
    return f"{where}: {fault['msg']}"
