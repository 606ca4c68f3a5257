"""``headway submit``: send a run to a target, or attach to it where it is in flight, and watch it to its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.request import build_request, free_repeat
from orchestrator.commands.watch import Watched, watch
from orchestrator.errors import SpecError
from orchestrator.release.outcome import Outcome, read_outcome
from orchestrator.render import submission_id
from orchestrator.reporter import Reporter, Result
from orchestrator.runs import identify
from orchestrator.spec import RunSpec, load
from orchestrator.store import Store
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt
from orchestrator.store.probe import require_conditional_writes
from orchestrator.targets.base import Target


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A run on its way: which, as which job, and whether this call started it."""

    run_id: str
    submission_id: str
    attached: bool
    attempt: int = 0
    """The number that the job claims, unless others come first; what happened before it is not this job's."""
    outcome: Outcome | None = None


def submit(
    run_file: Path,
    *,
    target: str,
    store_uri: str | None,
    detach: bool,
    timeout_s: float | None,
    reporter: Reporter,
) -> Result:
    spec = load(run_file)
    if target != "local" and spec.data.train is not None and not spec.data.train.startswith("s3://"):
        raise SpecError(
            f"data.train {spec.data.train!r} is a path of this machine, which {target} does not see.",
            next_step="Put the data into S3 and name it as s3://bucket/prefix/**.",
        )
    cluster, store = find_target(target), find_store(store_uri)
    sent = send(spec, run_file, store, cluster, reporter, directory=Path.cwd())
    facts: dict[str, Any] = {"run_id": sent.run_id, "submission_id": sent.submission_id, "attached": sent.attached}
    if detach and sent.outcome is None:
        return facts, f"{sent.run_id} is on its way. Watch it: headway logs -f {sent.run_id}"
    watched = Watched(outcome=sent.outcome) if sent.outcome else watch(
        sent.run_id, sent.submission_id, store, cluster, reporter, from_attempt=sent.attempt, timeout_s=timeout_s
    )  # fmt: skip
    outcome = watched.require_outcome(sent.run_id)
    outcome.raise_unless_done()
    return {**facts, **outcome.model_dump(mode="json")}, describe(outcome)


def send(spec: RunSpec, run_file: Path, store: Store, target: Target, reporter: Reporter, *, directory: Path) -> Sent:
    """Submit the run unless it has an outcome or is in flight already."""
    require_conditional_writes(store)
    identity = identify(spec, store, directory)
    standing = read_outcome(store, identity.run_id)
    if standing is not None:
        reporter.say(f"{identity.run_id} is {standing.state} already; nothing is sent.")
        return Sent(run_id=identity.run_id, submission_id="", attached=True, outcome=standing)
    flight = in_flight(store, target, identity.run_id)
    if flight is not None:
        reporter.say(f"{identity.run_id} is in flight as {flight.job}; attached.")
        return Sent(run_id=identity.run_id, submission_id=flight.job, attached=True, attempt=flight.attempt)
    prepared = build_request(spec, run_file, store, target, directory=directory)
    for skipped in prepared.package.skipped:
        reporter.say(f"not sent: {skipped}")
    submission = target.submit(prepared.request, prepared.package)
    reporter.say(f"{identity.run_id} submitted as {submission.submission_id}")
    return Sent(
        run_id=identity.run_id,
        submission_id=submission.submission_id,
        attached=not submission.created,
        attempt=prepared.attempt,
    )


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A job that works on a run, or is about to."""

    job: str
    attempt: int
    claimed: bool
    """Whether the attempt exists; if not, it is the number that the job will claim."""


def in_flight(store: Store, target: Target, run_id: str) -> Flight | None:
    """The job that works on the run now: the newest attempt's, or one sent that has claimed none yet; else None."""
    number = newest_attempt(store, run_id)
    following = number + 1
    sent = submission_id(run_id, following, repeat=free_repeat(target, run_id, following))
    flights = [Flight(job=sent, attempt=following, claimed=False)]
    if number and attempt_end(store, run_id, number) is None:
        job = str(read_attempt(store, run_id, number).get("job", ""))
        flights.insert(0, Flight(job=job, attempt=number, claimed=True))
    for flight in flights:
        status = target.find(flight.job)
        if status is not None and not status.state.ended:
            return flight
    return None


def describe(outcome: Outcome) -> str:
    """An outcome for people."""
    facts = outcome.facts
    evaluation = facts.get("evaluation", {})
    lines = [f"{outcome.run_id} is {outcome.state}" + (f": {outcome.reason}" if outcome.reason else "")]
    if evaluation:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.items() if isinstance(v, float))
        lines.append(f"  evaluation  {figures}")
    lines += [f"  {k:<11} {facts[k]}" for k in ("version", "checkpoint", "dataset") if facts.get(k)]
    return "\n".join(lines)
