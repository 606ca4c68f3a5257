"""``headway pod …``: what Headway's pods run beside Ray. No person types these."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import HeadwayError, UsageError
from orchestrator.reporter import Reporter, Result
from orchestrator.store import open_store
from orchestrator.store.s3 import PATIENT, PROMPT


def fetch_code(*, digest: str, to: Path, version: str, store_uri: str | None) -> Result:
    from orchestrator.pod.fetch_code import fetch_code as program

    program(open_store(store_uri, patience=PATIENT), digest=digest, to=to, version=version)
    return {"digest": digest, "to": str(to)}, f"Code package {digest[:12]}… is in {to}."


def ship_logs(
    run_id: str, *, root: Path, pod: str | None, timeout_s: float, store_uri: str | None, reporter: Reporter
) -> Result:
    """Ship until SIGTERM, which ends it well whatever could be stored."""
    from orchestrator.pod.ship_logs import PATIENCE, LogShipper
    from orchestrator.pod.ship_logs import ship_logs as program

    if not pod:
        raise UsageError("ship-logs does not know its pod's name.", next_step="Give --pod, or set POD_NAME.")
    store = open_store(store_uri, patience=PATIENCE)
    shipper = LogShipper(store, run_id, root=root, pod=pod, say=reporter.say)
    whole = program(shipper, say=reporter.say, last_pass_s=timeout_s)
    text = "All logs are stored." if whole else f"Not all logs could be stored within {timeout_s:.0f} s."
    return {"run_id": run_id, "pod": pod, "whole": whole}, text


def save_and_stop(
    run_id: str, *, job: str, pod: str | None, timeout_s: float, store_uri: str | None, reporter: Reporter
) -> Result:
    """Never fails: an error in a preStop is only noise, and the pod ends all the same."""
    from orchestrator.pod.save_and_stop import save_and_stop as program

    try:
        store = open_store(store_uri, patience=PROMPT)
        text = program(store, run_id, job=job, pod=pod, timeout_s=timeout_s, say=reporter.say)
    except HeadwayError as e:
        text = f"{run_id} was not asked to save: {e}"
    return {"run_id": run_id, "job": job, "did": text}, text
