"""``headway run``: brings a run to its outcome, inside a Ray job."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.commands.inside import modules_of_workloads
from orchestrator.errors import (
    AttemptsUsedUp,
    Displaced,
    Fenced,
    HeadwayError,
    Interrupted,
    RunError,
    UsageError,
)
from orchestrator.release.outcome import Outcome
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import load
from orchestrator.store.attempts import Allowance
from orchestrator.store.s3 import PATIENT

_END_S = 600.0
Attempts = tuple[int, int]
"""The first attempt that this job may make, and how many in all."""


def run(
    run_file: Path,
    store_uri: str | None,
    attempts: Attempts | None,
    reporter: Reporter,
    *,
    edition: int | None = None,
    run_id: str | None = None,
    await_end: Callable[[], object] = lambda: time.sleep(_END_S),
) -> Result:
    """Bring the run to its outcome on the Ray cluster that this process is part of.

    Args:
        attempts: given where a failed job is started again on a new cluster, as by KubeRay. Then this ends with 0
            wherever another start would change nothing; what the run came to is read in the store.
        edition: of the run; None is the newest that the store knows.
        run_id: as the run was submitted; None is the run of what the run file names now.
        await_end: waits for the end of this pod, with all of its processes. A job that ended before it would count as
            failed, while one whose head is gone is started again and does not count.
    """
    if attempts is None:
        outcome = _run(run_file, store_uri, None, edition, run_id, reporter)
        outcome.raise_unless_done()
    else:
        try:
            outcome = _run(run_file, store_uri, attempts, edition, run_id, reporter)
        except HeadwayError as e:
            if isinstance(e, Displaced):
                reporter.error(e)
                await_end()
            if _would_go_on_elsewhere(e):
                raise
            reporter.error(e)
            return {}, ""
    told = outcome.facts.get("version", "not released") if outcome.state == "done" else outcome.reason
    return outcome.model_dump(mode="json"), f"{outcome.run_id} is {outcome.state}: {told}"


def _would_go_on_elsewhere(error: HeadwayError) -> bool:
    """Whether another start may come further: not after a person's mistake or stop, and not where others took over."""
    final = (UsageError, RunError, Fenced, AttemptsUsedUp, Interrupted)
    return isinstance(error, Displaced) or not isinstance(error, final)


def _run(
    run_file: Path,
    store_uri: str | None,
    attempts: Attempts | None,
    edition: int | None,
    run_id: str | None,
    reporter: Reporter,
) -> Outcome:
    spec = load(run_file)
    store = find_store(store_uri, patience=PATIENT)
    cluster, pipeline = modules_of_workloads(
        "cluster",
        "pipeline",
        does="headway run executes training",
        elsewhere="To send the run elsewhere: headway submit",
    )
    job_id = cluster.connect(reporter.say)
    allowance = Allowance(job_id=job_id, first=attempts[0], max_attempts=attempts[1]) if attempts else None
    outcome: Outcome = pipeline.run(
        spec,
        store,
        working_directory=Path.cwd(),
        job_id=job_id,
        say=reporter.say,
        allowance=allowance,
        edition=edition,
        run_id=run_id,
    )
    return outcome
