"""``headway logs`` and ``headway stop``."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.show import resolve_run, resolve_submitted
from orchestrator.commands.submit import Flight, in_flight
from orchestrator.errors import HeadwayError, TimedOut, UsageError
from orchestrator.record.logs import LogReader
from orchestrator.release.outcome import read_outcome
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt, request_stop
from orchestrator.targets.base import Target

_POLL_S = 0.5


def logs(run_id: str, *, target: str, store_uri: str | None, follow: bool, reporter: Reporter) -> Result:
    cluster, store = find_target(target, store_uri), find_store(store_uri)
    run_id = resolve_submitted(store, cluster, run_id)
    number = newest_attempt(store, run_id)
    job = str(read_attempt(store, run_id, number)["job"]) if number else cluster.runs().get(run_id, "")
    if not job:
        raise UsageError(f"{run_id} has no attempt yet.", next_step=f"See: headway status{cluster.flag} {run_id}")
    if not follow or reporter.json_mode:
        text = cluster.logs(run_id, job)
        return {"run_id": run_id, "attempt": number, "job": job, "log": text}, text
    for piece in cluster.follow(run_id, job):
        reporter.stream(piece)
    return {"run_id": run_id, "attempt": number, "job": job}, ""


def stored_logs(run_id: str, file: str | None, *, store_uri: str | None, reporter: Reporter) -> Result:
    """What pods left in the store: all files, or the text of one."""
    store = find_store(store_uri)
    run_id = resolve_run(store, run_id)
    reader = LogReader(store, run_id)
    files = {f"{each.pod}/{each.session}/{each.name}": each for each in reader.files()}
    if file is None:
        lines = [f"{each.size_bytes:>12,}  {name}" for name, each in files.items()]
        facts = [
            {"file": name, "bytes": each.size_bytes, "modified_s": each.modified_s} for name, each in files.items()
        ]
        text = "\n".join(lines) or f"Nothing is stored of {run_id}: only Kubernetes pods keep logs in the store."
        return {"run_id": run_id, "files": facts}, text
    if file not in files:
        raise UsageError(
            f"{run_id} has no log file {file!r} in the store.", next_step=f"See: headway logs {run_id} --files"
        )
    if reporter.json_mode:
        return {"run_id": run_id, "file": file, "log": "".join(reader.read(files[file]))}, ""
    for piece in reader.read(files[file]):
        reporter.stream(piece)
    return {}, ""


def stop(run_id: str, *, target: str, store_uri: str | None, timeout_s: float, reporter: Reporter) -> Result:
    cluster, store = find_target(target, store_uri), find_store(store_uri)
    run_id = resolve_submitted(store, cluster, run_id)
    return stop_run(run_id, store, cluster, timeout_s=timeout_s, reporter=reporter)


def stop_run(run_id: str, store: Store, cluster: Target[Any], *, timeout_s: float, reporter: Reporter) -> Result:
    """Ask the run's newest attempt to save and end, and wait for it; past the time, end its job."""
    outcome = read_outcome(store, run_id)
    if outcome is not None:
        return {"run_id": run_id, "state": outcome.state}, f"{run_id} is {outcome.state}; there is nothing to stop."
    flight = in_flight(store, cluster, run_id)
    if flight is None:
        return {"run_id": run_id, "state": "idle"}, f"{run_id} is not running."
    job, number = flight.job, flight.attempt
    ask_to_stop(run_id, flight, store, cluster, reason="headway stop")
    reporter.say(f"{run_id} is asked to save and end …")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = cluster.find(job)
        if status is None or status.over:
            end = attempt_end(store, run_id, number) or {"reason": "its job ended"}
            return {"run_id": run_id, "state": "stopped", **end}, f"{run_id} stopped. {end['reason']}"
        time.sleep(_POLL_S)
    try:
        cluster.stop(job)
    except HeadwayError as e:
        reporter.say(f"Its job could not be ended: {e}")
    raise TimedOut(
        f"{run_id} did not end within {timeout_s:.0f} s; its job is being ended now.",
        next_step="Submitting it again goes on from the last checkpoint.",
    )


def ask_to_stop(run_id: str, flight: Flight, store: Store, cluster: Target[Any], *, reason: str) -> None:
    """Ask the job that works on a run to save and end; one that has not begun is ended at once."""
    status = cluster.find(flight.job)
    if flight.claimed and not (status is not None and status.hopeless):
        request_stop(store, run_id, flight.attempt, reason=reason)
    else:  # a request would outlive the job and stop whoever claims the number later
        cluster.stop(flight.job)
