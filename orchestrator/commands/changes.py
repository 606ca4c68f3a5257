"""What makes one run another than the newest of its name: in words for people, and as names for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import IntegrityError, NotFound
from orchestrator.runs import RunIdentity
from orchestrator.spec import RunSpec
from orchestrator.store import Store, layout

_UNSET = "not set"
_MAX_TOLD = 200


@dataclass(frozen=True, kw_only=True)
class Change:
    what: str
    """A field of the run file, or ``data.train``, ``code``, ``model.pretrained``, ``edition``."""
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}"


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An earlier run of the same name."""

    run_id: str
    recorded: dict[str, Any]
    """Its ``spec.json``."""


def newest_of_name(store: Store, name: str) -> Earlier | None:
    """The run of this name that was begun last."""
    named = (run_id for run_id in store.list_folders("runs/") if run_id.rpartition("-")[0] == name)
    begun = [(item.modified_s, run_id) for run_id in named for item in store.list(layout.run_spec(run_id))]
    for _, run_id in sorted(begun, reverse=True):
        with suppress(IntegrityError, NotFound):  # no other run's damage keeps this one from being sent
            return Earlier(run_id=run_id, recorded=store.get_json(layout.run_spec(run_id)))
    return None


def changes(earlier: Mapping[str, Any], spec: RunSpec, identity: RunIdentity) -> list[Change]:
    """What differs of all that a run's id is made of. Pure.

    Args:
        earlier: the other run's ``spec.json``.
    """
    try:
        before = RunSpec.model_validate(earlier["spec"])
    except (KeyError, ValidationError):
        return [Change(what="headway", how=f"the run before is of version {earlier.get('headway', 'unknown')}")]
    found = list(_fields("", _decisive(before), _decisive(spec)))
    if identity.dataset_fingerprint != earlier.get("dataset_fingerprint"):
        fields = list(_fields("data.", before.data.model_dump(mode="json"), spec.data.model_dump(mode="json")))
        found += fields or [Change(what="data.train", how="the source's files are others")]
    base = identity.base.fingerprint if identity.base is not None else ""
    if base != earlier.get("base_fingerprint", ""):
        found.append(Change(what="model.pretrained", how="its files are others"))
    if identity.code_digest != earlier.get("code_digest", ""):
        found.append(Change(what="code", how="the task's Python files are others"))
    if identity.edition != earlier.get("edition", 0):
        found.append(Change(what="edition", how=f"the same done anew, as edition {identity.edition}"))
    return found


def _decisive(spec: RunSpec) -> dict[str, Any]:
    """The fields outside ``data`` that decide the weights, as :func:`orchestrator.spec.run_id` takes them."""
    return spec.model_dump(
        mode="json", include={"task", "model", "train"}, exclude={"model": {"pretrained"}, "train": {"step_timeout"}}
    )


def _fields(prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for name in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _fields(f"{prefix}{name}.", old, new)
        elif old != new:
            yield Change(what=f"{prefix}{name}", how=f"{_told(old)} → {_told(new)}")


def _told(value: object) -> str:
    """In one line, and no long one."""
    return _UNSET if value is None else shorten(str(value), _MAX_TOLD, placeholder=" …")
