"""``headway list``, ``show`` and ``status``: what is in the store. Needs neither ray nor torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from orchestrator.checkpoint.base import open_base, require_files
from orchestrator.checkpoint.catalog import Folder, committed, committed_steps, manifests
from orchestrator.checkpoint.format import Manifest
from orchestrator.checkpoint.reader import CheckpointReader
from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.show_model import has_versions, model_facts, model_lines, version_facts
from orchestrator.commands.submit import in_flight
from orchestrator.dataset.format import read_manifest as read_dataset
from orchestrator.errors import HeadwayError, IntegrityError, NotFound, UsageError
from orchestrator.record import EventReader
from orchestrator.release import channels
from orchestrator.release.outcome import read_outcome
from orchestrator.release.versions import list_versions
from orchestrator.reporter import Result
from orchestrator.store import Store, layout
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt
from orchestrator.targets.base import JobStatus, Target

Rows = list[dict[str, Any]]
_EARLIEST_S = 1e9  # a figure above this is a time in seconds since 1970


def list_things(what: str, run_id: str | None, *, store_uri: str | None) -> Result:
    known: dict[str, Callable[[Store], Rows]] = {
        "runs": _runs,
        "models": _models,
        "datasets": _datasets,
        "checkpoints": lambda store: _checkpoints(store, resolve_checkpoints(store, run_id or "")),
    }
    if what not in known:
        raise UsageError(f"There is no list of {what!r}.", next_step=f"Choose one of {', '.join(known)}.")
    if what == "checkpoints" and not run_id:
        raise UsageError("headway list checkpoints needs a run.", next_step="See: headway list runs")
    rows = known[what](find_store(store_uri))
    return {what: rows}, _table(rows) if rows else f"There are no {what} yet."


def show(name: str, *, store_uri: str | None) -> Result:
    store = find_store(store_uri)
    model, _, number = name.partition("@")
    if number:
        if not (number.isascii() and number.isdigit()):
            raise UsageError(f"{name!r} is not MODEL@NUMBER.", next_step=f"See: headway show {model}")
        facts = version_facts(store, model, int(number))
        return facts, _lines(facts)
    if has_versions(store, model):
        facts = model_facts(store, model)
        return facts, _lines(model_lines(facts))
    return status(name, target="", store_uri=store_uri)


def status(run_id: str, *, target: str, store_uri: str | None) -> Result:
    """Where a run stands. The target is asked only where one is given and the run has no outcome."""
    store = find_store(store_uri)
    try:
        run_id = resolve_run(store, run_id)
    except UsageError:
        waiting = _submitted(target, store, run_id) if target else None
        if waiting is None:
            raise
        return waiting, _lines(waiting)
    facts: dict[str, Any] = {"run_id": run_id, **_state(store, run_id)}
    events = EventReader(store, run_id).poll()
    steps = [event for event in events if event["kind"] == "step"]
    looks = [event for event in events if event["kind"] == "look"]
    stages = [event["stage"] for event in events if event["kind"] == "stage_started"]
    facts["stage"] = stages[-1] if stages else None
    facts["last_step"] = {k: v for k, v in steps[-1].items() if k not in ("kind", "time_s")} if steps else None
    if looks:
        facts["last_look"] = {k: v for k, v in looks[-1].items() if k not in ("kind", "time_s")}
    facts["last_event_s_ago"] = round(time.time() - events[-1]["time_s"], 1) if events else None
    facts["checkpoints"] = committed_steps(store, run_id)
    outcome = read_outcome(store, run_id)
    if outcome is not None:
        facts["outcome"] = outcome.model_dump(mode="json")
    elif target:
        facts |= _job(target, store, run_id, facts["job"])
    return facts, _lines(facts)


def resolve_run(store: Store, name: str) -> str:
    """A run's id from itself or from its name, which means the newest run of that name.

    Raises:
        UsageError: there is none.
    """
    if store.exists(layout.run_spec(name)):
        return name
    found = [run for run in store.list_folders("runs/") if run.rpartition("-")[0] == name]
    if not found:
        raise UsageError(f"There is no run {name!r} in {store.uri}.", next_step="See: headway list runs")
    return max(found, key=lambda run: _started_s(store, run))


def resolve_submitted(store: Store, target: Target[Any], name: str) -> str:
    """As :func:`resolve_run`, for a run too that waits on the target and is in no store yet."""
    try:
        return resolve_run(store, name)
    except UsageError:
        found = _newest_submitted(target, name)
        if found is None:
            raise
        return found[0]


def _newest_submitted(target: Target[Any], name: str) -> tuple[str, str] | None:
    """The newest run of this id or name that the target knows, and its job."""
    found = [(run, job) for run, job in target.runs().items() if name in (run, run.rpartition("-")[0])]
    return found[-1] if found else None


def _submitted(target: str, store: Store, name: str) -> dict[str, Any] | None:
    """What is known of a run without an attempt; None where the target knows none of that name, or is not there."""
    try:
        cluster = find_target(target, store.uri)
        found = _newest_submitted(cluster, name)
        status = cluster.find(found[1]) if found else None
    except HeadwayError:
        return None
    if found is None:
        return None
    return {"run_id": found[0], "state": "waiting", "attempts": 0, "job": found[1], "job_state": _in_words(status)}


def resolve_checkpoints(store: Store, name: str) -> str:
    """As :func:`resolve_run`, for a loop of one's own too, which has checkpoints and no run file."""
    return name if committed(store, name) else resolve_run(store, name)


def _started_s(store: Store, run_id: str) -> float:
    return max((item.modified_s for item in store.list(layout.run_spec(run_id))), default=0.0)


def _state(store: Store, run_id: str) -> dict[str, Any]:
    """state, reason, number of attempts and job of the newest."""
    number = newest_attempt(store, run_id)
    job = read_attempt(store, run_id, number).get("job") if number else None
    outcome = read_outcome(store, run_id)
    if outcome is not None:
        return {"state": outcome.state, "reason": outcome.reason, "attempts": number, "job": job}
    end = attempt_end(store, run_id, number) if number else None
    if end is not None:
        return {"state": end["state"], "reason": end["reason"], "attempts": number, "job": job}
    return {"state": "in flight" if number else "waiting", "reason": "", "attempts": number, "job": job}


def _job(target: str, store: Store, run_id: str, newest: str | None) -> dict[str, Any]:
    """The job that works on a run now, or else its newest attempt's, and how it is doing."""
    try:
        cluster = find_target(target, store.uri)
        flight = in_flight(store, cluster, run_id)
        job = flight.job if flight else newest
        return {"job": job, "job_state": _in_words(cluster.find(job))} if job else {}
    except HeadwayError as e:
        return {"job_state": f"unknown: {e.message}"}


def _in_words(status: JobStatus | None) -> str:
    if status is None:
        return "gone: the cluster knows no such job"
    return f"{status.state}: {status.message}" if status.message else str(status.state)


def _runs(store: Store) -> Rows:
    rows = []
    for run_id in store.list_folders("runs/"):
        state = _state(store, run_id)
        outcome = read_outcome(store, run_id)
        facts = outcome.facts if outcome else {}
        rows.append(
            {
                "run": run_id,
                "state": state["state"],
                "attempts": state["attempts"],
                "checkpoint": next(iter(committed_steps(store, run_id)), None),
                "eval_loss": facts.get("evaluation", {}).get("loss"),
                "version": facts.get("version"),
            }
        )
    return rows


def _models(store: Store) -> Rows:
    rows = []
    for model in store.list_folders("models/"):
        for version in list_versions(store, model):
            rows.append(
                {
                    "version": version.name,
                    "run": version.run_id,
                    "eval_loss": version.evaluation.get("loss"),
                    "channels": ", ".join(
                        name
                        for name in store.list_folders(f"models/{model}/channels/")
                        if (entry := channels.newest(store, model, name)) and entry.version == version.number
                    ),
                }
            )
    return rows


def _datasets(store: Store) -> Rows:
    rows = []
    for name in store.list_folders("datasets/"):
        for fingerprint in store.list_folders(layout.datasets(name)):
            try:
                manifest = read_dataset(store, name, fingerprint)
            except NotFound:
                continue
            rows.append(
                {
                    "dataset": f"{name}@{fingerprint}",
                    "train_tokens": manifest.train.num_tokens,
                    "eval_tokens": manifest.eval.num_tokens,
                    "vocabulary": manifest.tokenizer.vocab_size,
                    "source": manifest.source.get("pattern"),
                }
            )
    return rows


def _checkpoints(store: Store, run_id: str) -> Rows:
    return [_checkpoint(store, folder, found) for folder, found in manifests(store, run_id)]


def _checkpoint(store: Store, folder: Folder, found: Manifest | IntegrityError) -> dict[str, Any]:
    row: dict[str, Any] = {"step": folder.step, "attempt": folder.attempt}
    if isinstance(found, IntegrityError):
        return {**row, "size_bytes": None, "world_size": None, "verified": f"damaged: {found.message}", "age_s": None}
    try:
        CheckpointReader(store, folder, found).check_indexes()
        if found.base is not None:
            require_files(store, open_base(store, found.base))
        verified = "yes"
    except (IntegrityError, NotFound) as e:
        verified = f"damaged: {e.message}"
    return {
        **row,
        "size_bytes": found.size_bytes,
        "world_size": found.world_size,
        "verified": verified,
        "age_s": round(time.time() - found.created_s),
    }


def _table(rows: Rows) -> str:
    """Rows of one shape, in columns."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, *cells]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < _EARLIEST_S else datetime.fromtimestamp(value).isoformat(" ", "seconds")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _lines(facts: dict[str, Any], indent: int = 0) -> str:
    """Nested facts, one a line."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [" " * indent + f"{name}:", _lines(value, indent + 2)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(" " * indent + f"{name}:")
            lines += [" " * (indent + 2) + "; ".join(f"{k} {_cell(v)}" for k, v in item.items()) for item in value]
        elif isinstance(value, list):
            lines.append(" " * indent + f"{name}: {', '.join(map(_cell, value)) or '-'}")
        else:
            lines.append(" " * indent + f"{name}: {_cell(value)}")
    return "\n".join(lines)
