"""``headway show MODEL`` and ``MODEL@N``: what a channel wants and what serves; where a version came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.dataset.format import read_manifest
from orchestrator.errors import IntegrityError, NotFound, UsageError
from orchestrator.pretrained.format import read_base
from orchestrator.release import channels
from orchestrator.release.channels import ChannelEntry, ChannelStatus
from orchestrator.release.versions import Version, list_versions, read_version
from orchestrator.release.way_back import Verdicts, in_force
from orchestrator.store import Store, layout

Facts = dict[str, Any]
_SOURCE = ("pattern", "num_files", "num_bytes")


def has_versions(store: Store, model: str) -> bool:
    return any(True for _ in store.list(layout.versions(model)))


def model_facts(store: Store, model: str) -> Facts:
    """The model's versions, and of each channel what is wanted, what serves, and its history."""
    return {
        "model": model,
        "versions": [
            {"version": each.name, "run": each.run_id, "eval_loss": each.evaluation.get("loss")}
            for each in list_versions(store, model)
        ],
        "channels": {name: _channel(store, model, name) for name in store.list_folders(f"models/{model}/channels/")},
    }


def model_lines(facts: Facts) -> Facts:
    """The same for people: a line for each entry, verdicts in words, and nothing that is empty."""
    return {**facts, "channels": {name: _channel_lines(facts["model"], one) for name, one in facts["channels"].items()}}


def version_facts(store: Store, model: str, number: int) -> Facts:
    """``version.json``, and its lineage from the run back to the source files.

    Raises:
        UsageError: there is no such version.
    """
    try:
        version = read_version(store, model, number)
    except NotFound as e:
        raise UsageError(f"There is no version {model}@{number}.", next_step=f"See: headway show {model}") from e
    return {**version.document(), "lineage": _lineage(store, version)}


def version_number(name: str) -> int:
    """N of ``MODEL@N``.

    Raises:
        UsageError: it is none.
    """
    model, _, number = name.partition("@")
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"{name!r} is not MODEL@NUMBER.", next_step=f"See: headway show {model}")
    return int(number)


def _channel(store: Store, model: str, name: str) -> Facts:
    history = channels.history(store, model, name)
    entries, damaged = history.entries, list(history.damaged)
    try:
        status = channels.read_status(store, model, name)
    except IntegrityError as e:
        status, damaged = None, [*damaged, e.message]
    now = in_force(entries, Verdicts.of(status))
    return {
        "wanted": entries[-1].version if entries else None,
        "in_force": now.version,
        "canary": now.canary.model_dump(mode="json") if now.canary else None,
        "serving": status.serving if status else None,
        "history": [entry.model_dump(mode="json") for entry in entries],
        "damaged": damaged,
        "status": status.model_dump(mode="json") if status else None,
    }


def _channel_lines(model: str, facts: Facts) -> Facts:
    status = ChannelStatus.model_validate(facts["status"]) if facts["status"] else None
    serving = facts["serving"]
    lines: Facts = {"wanted": _named(model, facts["wanted"])}
    if facts["in_force"] != facts["wanted"]:
        lines["in force"] = _named(model, facts["in_force"])
    if facts["canary"]:
        lines["canary"] = f"{model}@{facts['canary']['version']}, {facts['canary']['weight']:.4g} of the requests"
    lines["serving"] = _named(model, serving) if status else "nobody serves this channel yet"
    if status is not None:
        if status.problem:
            lines["problem"] = status.problem
        lines["rejected"] = {f"{model}@{number}": why for number, why in sorted(status.rejected.items())}
        lines["status of"] = status.updated_s
    lines["history"] = [_entry_line(model, ChannelEntry.model_validate(entry)) for entry in facts["history"]]
    lines["damaged"] = facts["damaged"]
    return {name: value for name, value in lines.items() if value not in ({}, [], None)}


def _entry_line(model: str, entry: ChannelEntry) -> Facts:
    canary = f" + {100 * entry.canary.weight:.4g}% {model}@{entry.canary.version}" if entry.canary else ""
    return {
        "entry": entry.number,
        "version": f"{model}@{entry.version}{canary}",
        "by": entry.by,
        "at": entry.created_s,
        "why": entry.reason,
    }


def _named(model: str, number: int | None) -> str:
    return "nothing" if number is None else f"{model}@{number}"


def _lineage(store: Store, version: Version) -> Facts:
    """What is on record of where a version came from; of what is gone, that it is gone."""
    return {
        "run": _or_gone(lambda: _run(store, version.run_id)),
        "dataset": _or_gone(lambda: _dataset(store, version)),
        "base": _or_gone(lambda: _base(store, version)),
    }


def _or_gone(look: Callable[[], Facts | None]) -> Facts | str | None:
    try:
        return look()
    except (NotFound, IntegrityError) as e:
        return f"not readable any more: {e.message}"


def _run(store: Store, run_id: str) -> Facts:
    found = store.get_json(layout.run_spec(run_id))
    spec = found.get("spec", {})
    return {
        "run_id": run_id,
        "code_digest": found.get("code_digest"),
        "headway": found.get("headway"),
        "seed": spec.get("train", {}).get("seed"),
        "data": spec.get("data", {}).get("train") or spec.get("data", {}).get("dataset"),
        "base_fingerprint": found.get("base_fingerprint") or None,
    }


def _dataset(store: Store, version: Version) -> Facts:
    manifest = read_manifest(store, version.dataset.name, version.dataset.fingerprint)
    source: Facts = {name: manifest.source.get(name) for name in _SOURCE}
    return {
        "dataset": f"{manifest.name}@{manifest.fingerprint}",
        **source,
        "train_tokens": manifest.train.num_tokens,
        "eval_tokens": manifest.eval.num_tokens,
        "tokenizer_sha256": manifest.tokenizer.sha256,
    }


def _base(store: Store, version: Version) -> Facts | None:
    fingerprint = version.base.fingerprint if version.base is not None else None
    if fingerprint is None:
        fingerprint = store.get_json(layout.run_spec(version.run_id)).get("base_fingerprint") or None
    if fingerprint is None:
        return None
    return {"fingerprint": fingerprint, "source": read_base(store, fingerprint).uri}
