"""``headway show`` and ``status``: one thing in the store. Needs neither ray nor torch."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.checkpoint.catalog import committed, committed_steps
from orchestrator.commands.compare import compare
from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.show_dataset import dataset_facts, dataset_lines, named_dataset
from orchestrator.commands.show_model import has_versions, model_facts, model_lines, version_facts, version_number
from orchestrator.commands.submit import in_flight
from orchestrator.commands.text import lines
from orchestrator.errors import HeadwayError, UsageError
from orchestrator.record import EventReader
from orchestrator.release.outcome import read_outcome
from orchestrator.reporter import Result
from orchestrator.store import Store, layout
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt
from orchestrator.targets.base import JobStatus, Target


def show(name: str, other: str | None = None, *, store_uri: str | None) -> Result:
    """One thing, or two runs or two versions side by side."""
    store = find_store(store_uri)
    if other is not None:
        return compare(store, name, other, find_run=resolve_run)
    model, at, _ = name.partition("@")
    if at:
        return _show_dataset(store, name) or _show_version(store, name)
    if has_versions(store, model):
        facts = model_facts(store, model)
        return facts, lines(model_lines(facts))
    try:
        return status(name, target="", store_uri=store_uri)
    except UsageError:
        found = _show_dataset(store, name)
        if found is None:
            raise
        return found


def _show_dataset(store: Store, name: str) -> Result | None:
    dataset = named_dataset(store, name)
    if dataset is None:
        return None
    facts = dataset_facts(dataset)
    return facts, lines(dataset_lines(facts))


def _show_version(store: Store, name: str) -> Result:
    facts = version_facts(store, name.partition("@")[0], version_number(name))
    return facts, lines(facts)


def status(run_id: str, *, target: str, store_uri: str | None) -> Result:
    """Where a run stands. The target is asked only where one is given and the run has no outcome."""
    store = find_store(store_uri)
    try:
        run_id = resolve_run(store, run_id)
    except UsageError:
        waiting = _submitted(target, store, run_id) if target else None
        if waiting is None:
            raise
        return waiting, lines(waiting)
    facts: dict[str, Any] = {"run_id": run_id, **state_of(store, run_id)}
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
    return facts, lines(facts)


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


def state_of(store: Store, run_id: str) -> dict[str, Any]:
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
