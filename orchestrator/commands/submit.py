"""``headway submit``: send a run to a target, or attach to it where it is in flight, and watch it to its outcome."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.commands.context import find_store, find_target, is_kubernetes
from orchestrator.commands.request import build_request, free_repeat, hand_over, sending
from orchestrator.commands.sender import caller, ci_job
from orchestrator.commands.watch import Watched, watch
from orchestrator.dataset.listing import keep_listing
from orchestrator.errors import SpecError, StoreError, TimedOut
from orchestrator.release.outcome import Outcome, read_outcome
from orchestrator.render import submission_id
from orchestrator.reporter import Reporter, Result
from orchestrator.runs import RunIdentity, identify
from orchestrator.spec import RunSpec, load
from orchestrator.store import Store, layout
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt
from orchestrator.store.probe import require_conditional_writes
from orchestrator.targets.base import Target

_END_S, _POLL_S = 240.0, 1.0


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
    retry: bool,
    timeout_s: float | None,
    reporter: Reporter,
) -> Result:
    spec = load(run_file)
    check_sendable(spec, target, reporter)
    cluster, store = find_target(target, store_uri), find_store(store_uri)
    with sending(f"the run of {run_file}", next_step="headway submit attaches to it, and headway stop ends it."):
        sent = send(spec, run_file, store, cluster, reporter, directory=Path.cwd(), retry=retry)
    facts: dict[str, Any] = {"run_id": sent.run_id, "submission_id": sent.submission_id, "attached": sent.attached}
    if detach and sent.outcome is None:
        return facts, f"{sent.run_id} is on its way. Watch it: headway logs -f{cluster.flag} {sent.run_id}"
    watched = Watched(outcome=sent.outcome) if sent.outcome else watch(
        sent.run_id, sent.submission_id, store, cluster, reporter, from_attempt=sent.attempt, timeout_s=timeout_s
    )  # fmt: skip
    outcome = watched.require_outcome(sent.run_id)
    outcome.raise_unless_done()
    return {**facts, **outcome.model_dump(mode="json")}, describe(outcome)


def send(
    spec: RunSpec,
    run_file: Path,
    store: Store,
    target: Target[Any],
    reporter: Reporter,
    *,
    directory: Path,
    retry: bool = False,
    identity: RunIdentity | None = None,
) -> Sent:
    """Submit the run unless it has an outcome or is in flight already.

    Args:
        retry: where it is in flight, end that job and start anew from what is committed.
        identity: of the run, where it was found out before.
    """
    require_conditional_writes(store)
    identity = identity or identify(spec, store, directory)
    standing = read_outcome(store, identity.run_id)
    if standing is not None:
        reporter.say(f"{identity.run_id} is {standing.state} already; nothing is sent.")
        return Sent(run_id=identity.run_id, submission_id="", attached=True, outcome=standing)
    flight = in_flight(store, target, identity.run_id)
    if flight is not None and retry:
        _end(flight, target, reporter)
    elif flight is not None:
        reporter.say(f"{identity.run_id} is in flight as {flight.job}; attached.")
        return Sent(run_id=identity.run_id, submission_id=flight.job, attached=True, attempt=flight.attempt)
    prepared = build_request(spec, run_file, store, target, directory=directory, identity=identity)
    submission = hand_over(identity.run_id, prepared.request, prepared.package, target, reporter)
    if submission.created:
        _record(store, identity, submission.submission_id, target, reporter)
    return Sent(
        run_id=identity.run_id,
        submission_id=submission.submission_id,
        attached=not submission.created,
        attempt=prepared.attempt,
    )


def _record(store: Store, identity: RunIdentity, submission_id: str, target: Target[Any], reporter: Reporter) -> None:
    """Say in the run's record who sent it and when, and keep the source's listing; the run does not depend on it."""
    facts = {"by": caller(), "target": target.flag.rpartition(" ")[2] or "local", "ci": ci_job(os.environ)}
    try:
        store.create_json(layout.submission(identity.run_id, submission_id), {"submitted_s": time.time(), **facts})
    except StoreError as e:
        reporter.say(f"Who sent it is not in the run's record: {e}")
    try:
        keep_listing(store, identity.run_id, identity.files)
    except StoreError as e:
        reporter.say(f"The source's listing is not kept, so the source must not change until the run begins: {e}")


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A job that works on a run, or is about to."""

    job: str
    attempt: int
    claimed: bool
    """Whether the attempt exists; if not, it is the number that the job will claim."""


def in_flight(store: Store, target: Target[Any], run_id: str) -> Flight | None:
    """The job that works on the run now: the newest attempt's, or one sent that has claimed none yet; else None."""
    number = newest_attempt(store, run_id)
    following = number + 1
    sent = submission_id(run_id, following, repeat=free_repeat(target, run_id, following))
    flights = [Flight(job=sent, attempt=following, claimed=False)]
    goes_on = number > 0 and attempt_end(store, run_id, number) is None
    if goes_on or (number > 0 and target.restarts_jobs):
        job = str(read_attempt(store, run_id, number).get("job", ""))
        flights.insert(0, Flight(job=job, attempt=number if goes_on else following, claimed=goes_on))
    for flight in flights:
        status = target.find(flight.job)
        if status is not None and not status.over:
            return flight
    return None


def _end(flight: Flight, target: Target[Any], reporter: Reporter) -> None:
    """End a job that the next one is to take over from, so that it gives back what it holds.

    Raises:
        TimedOut: it goes on holding it.
    """
    reporter.say(f"Ending {flight.job}, which a new attempt takes over from …")
    target.stop(flight.job)
    deadline = time.monotonic() + _END_S
    while (status := target.find(flight.job)) is not None and (status.holds or not status.over):
        if time.monotonic() > deadline:
            raise TimedOut(
                f"{flight.job} has not ended within {_END_S:.0f} s.", next_step="Submit with --retry again in a while."
            )
        time.sleep(_POLL_S)


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


def check_sendable(spec: RunSpec, target: str, reporter: Reporter) -> None:
    """Say what of the run file the target does not get.

    Raises:
        SpecError: the run file names what lies on this machine alone, and the target is another.
    """
    if spec.secrets and not is_kubernetes(target):
        reporter.say(f"not sent: the secrets {', '.join(spec.secrets)}, which only Kubernetes has")
    if target == "local":
        return
    tokenizer = spec.data.tokenizer  # one in the working directory is sent with it
    in_directory = tokenizer is not None and not Path(tokenizer).expanduser().is_absolute()
    advice = {
        "data.train": (spec.data.train, "Put the data into S3 and name it as s3://bucket/prefix/**."),
        "model.pretrained": (spec.model.pretrained, "Put the model into S3 and name it as s3://bucket/prefix."),
        "data.tokenizer": (
            None if in_directory else tokenizer,
            "Put it into the working directory, or into S3 and name it as s3://bucket/key.",
        ),
    }
    for field, (place, next_step) in advice.items():
        if place is not None and not place.startswith(("s3://", "hf://")):
            raise SpecError(
                f"{field} {place!r} is a path of this machine, which {target} does not see.", next_step=next_step
            )
