"""``headway retrain``: have the run done that the data, the code and the run file of now describe. Made for CI.

Any number of calls, at once or one after the other, come to the same run: its id follows from what it is made of, a
run in flight is attached to, and one that is over is told.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.commands.changes import Change, Earlier, changes, newest_of_name
from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.estimate import estimate
from orchestrator.commands.logs import ask_to_stop
from orchestrator.commands.sender import caller, ci_job
from orchestrator.commands.submit import check_sendable, describe, in_flight, send
from orchestrator.commands.watch import watch
from orchestrator.errors import (
    AttemptFailed,
    EnvironmentUnusable,
    GateRefused,
    HeadwayError,
    Interrupted,
    RunError,
    TimedOut,
)
from orchestrator.release.outcome import Outcome, read_outcome
from orchestrator.reporter import Reporter, Result
from orchestrator.runs import RunIdentity, identify, in_edition
from orchestrator.spec import RunSpec, load
from orchestrator.store import Store
from orchestrator.store.attempts import newest_attempt
from orchestrator.store.editions import claim_edition
from orchestrator.store.s3 import UNATTENDED
from orchestrator.targets.base import Target

_WORDS: dict[type[HeadwayError], str] = {
    GateRefused: "refused",
    RunError: "failed",
    AttemptFailed: "failed",
    TimedOut: "timed_out",
    Interrupted: "interrupted",
}
"""What each kind of error makes the call's outcome; any other is an ``error``."""


@dataclass(frozen=True, kw_only=True)
class Options:
    wait: bool = False
    timeout_s: float | None = None
    """Of waiting; None waits for ever."""
    fresh: bool = False
    dry_run: bool = False
    stop_on_cancel: bool = False
    outputs: Path | None = None
    """A file that takes ``name=value`` lines, such as GitHub's ``$GITHUB_OUTPUT`` and GitLab's dotenv reports."""


@dataclass(kw_only=True)
class Answer:
    """What a call came to, as far as it came."""

    outcome: str = "error"
    """``unchanged``, ``submitted``, ``attached``; ``done``, ``refused``, ``failed``; ``timed_out``, ``interrupted``, or
    ``error`` where the call itself failed. Of a dry run: what it would be."""
    run_id: str = ""
    previous: str = ""
    """The run of this name that was begun last, where this one is new."""
    changed: list[Change] = field(default_factory=list)
    """What makes it another than that one."""
    facts: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    def to_json(self) -> dict[str, Any]:
        told = {"outcome": self.outcome, "run_id": self.run_id, "version": self.version, "previous": self.previous}
        return {**told, "changed": {change.what: change.how for change in self.changed}, **self.facts}

    def append_to(self, outputs: Path) -> None:
        """Raises OSError where the file cannot be written."""
        values = {
            "outcome": self.outcome,
            "run_id": self.run_id,
            "version": self.version,
            "changed": ",".join(change.what for change in self.changed),
        }
        with outputs.open("a", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())


def retrain(run_file: Path, *, target: str, store_uri: str | None, options: Options, reporter: Reporter) -> Result:
    """
    Raises:
        GateRefused, RunError: the run is over, and ended so. AttemptFailed: waited for, and its attempt failed.
        TimedOut, Interrupted: no longer waited for; the run goes on, unless ``stop_on_cancel``.
    """
    answer = Answer()
    try:
        with _cancellable() as cancelled:
            try:
                check_sendable(load(run_file), target, reporter)
                return bring(
                    run_file,
                    find_store(store_uri, patience=UNATTENDED),
                    lambda: find_target(target, store_uri, patience=UNATTENDED),
                    options,
                    reporter,
                    answer,
                    directory=Path.cwd(),
                )
            except (KeyboardInterrupt, Interrupted):
                if not cancelled:
                    raise
                raise _cancel(answer, target, store_uri, options) from None
    except HeadwayError as e:
        answer.outcome = next((word for kind, word in _WORDS.items() if isinstance(e, kind)), "error")
        e.facts = answer.to_json()
        raise
    finally:
        if options.outputs is not None:
            answer.append_to(options.outputs)


def bring(
    run_file: Path,
    store: Store,
    find_cluster: Callable[[], Target[Any]],
    options: Options,
    reporter: Reporter,
    answer: Answer,
    *,
    directory: Path,
) -> Result:
    """Find out which run it is, and send it, attach to it, or tell what became of it.

    Args:
        find_cluster: asked for only where something may be sent.
        answer: takes what becomes known on the way.
        directory: what is sent; holds the run file.
    """
    spec = load(run_file)
    identity = identify(spec, store, directory)
    answer.run_id = identity.run_id
    standing = read_outcome(store, identity.run_id)
    if standing is not None and not options.fresh and not options.dry_run:
        return _tell_standing(standing, spec, answer)
    cluster = find_cluster()
    if options.fresh:
        identity = _fresh(spec, store, cluster, identity, over=standing is not None, claim=not options.dry_run)
        answer.run_id, standing = identity.run_id, read_outcome(store, identity.run_id)
    is_new = newest_attempt(store, identity.run_id) == 0
    earlier = _compare(spec, store, identity, answer) if is_new or options.dry_run else None
    if options.dry_run:
        return _tell_dry(spec, store, cluster, identity, standing, earlier, answer)
    sent = send(spec, run_file, store, cluster, reporter, directory=directory, identity=identity)
    if sent.outcome is not None:
        return _tell_standing(sent.outcome, spec, answer)
    answer.outcome = "attached" if sent.attached else "submitted"
    answer.facts["submission_id"] = sent.submission_id
    if not options.wait:
        text = f"{sent.run_id} is on its way. Watch it: headway logs -f{cluster.flag} {sent.run_id}"
        return answer.to_json(), _with_changes(text, answer)
    watched = watch(
        sent.run_id,
        sent.submission_id,
        store,
        cluster,
        reporter,
        from_attempt=sent.attempt,
        timeout_s=options.timeout_s,
    )
    outcome = watched.require_outcome(sent.run_id)
    answer.version = str(outcome.facts.get("version", ""))
    outcome.raise_unless_done()
    answer.outcome = "done"
    answer.facts |= outcome.model_dump(mode="json", include={"facts", "attempt"})
    return answer.to_json(), _with_changes(describe(outcome), answer)


def _tell_standing(standing: Outcome, spec: RunSpec, answer: Answer) -> Result:
    """
    Raises:
        GateRefused, RunError: it did not end well, and would not if it were done again.
    """
    answer.version = str(standing.facts.get("version", ""))
    if standing.state == "refused":
        raise GateRefused(
            f"{standing.run_id} was refused by the gate before, and nothing that it is made of has changed since: "
            f"{standing.reason}",
            next_step="Change the data, the code or the run file, or train it anew: headway retrain --fresh",
        )
    if standing.state == "failed":
        raise RunError(
            f"{standing.run_id} failed for good before, and nothing that it is made of has changed since: "
            f"{standing.reason}",
            next_step="Mend that in the data, the code or the run file, or train it anew: headway retrain --fresh",
        )
    answer.outcome = "unchanged"
    lines = [f"Unchanged: {standing.run_id} is done, and what it is made of is the same."]
    if answer.version:
        lines.append(f"  version  {answer.version}")
    elif spec.release is not None:
        lines.append("  It was trained without release, and so has no version: headway retrain --fresh trains it anew.")
    return answer.to_json(), "\n".join(lines)


def _fresh(
    spec: RunSpec, store: Store, cluster: Target[Any], identity: RunIdentity, *, over: bool, claim: bool
) -> RunIdentity:
    """The run to do anew: the next edition, or this one where it is in flight, or was never begun."""
    if not over:
        begun = newest_attempt(store, identity.run_id) > 0
        if not begun or in_flight(store, cluster, identity.run_id) is not None:
            return identity
    first, following = identity.first or identity, identity.edition + 1
    if claim:
        facts = {"by": caller(), "ci": ci_job(os.environ)}
        following = claim_edition(store, first.run_id, after=identity.edition, facts=facts)
    return in_edition(first, spec, following)


def _compare(spec: RunSpec, store: Store, identity: RunIdentity, answer: Answer) -> Earlier | None:
    """The run of this name that was begun last; where that is another one, what makes this one another is noted."""
    earlier = newest_of_name(store, spec.name)
    if earlier is not None and earlier.run_id != identity.run_id:
        answer.previous = earlier.run_id
        answer.changed = changes(earlier.recorded, spec, identity)
    return earlier


def _tell_dry(
    spec: RunSpec,
    store: Store,
    cluster: Target[Any],
    identity: RunIdentity,
    standing: Outcome | None,
    earlier: Earlier | None,
    answer: Answer,
) -> Result:
    answer.facts["dry_run"] = True
    if standing is not None:
        answer.outcome = "unchanged" if standing.state == "done" else standing.state
        answer.version = str(standing.facts.get("version", ""))
        reason = f": {standing.reason}" if standing.reason else ""
        return answer.to_json(), f"Nothing would be sent: {identity.run_id} is {standing.state}{reason}."
    flight = in_flight(store, cluster, identity.run_id)
    if flight is not None:
        answer.outcome = "attached"
        return answer.to_json(), f"Nothing would be sent: {identity.run_id} is in flight as {flight.job}."
    answer.outcome = "submitted"
    number = newest_attempt(store, identity.run_id) + 1
    found = estimate(store, spec, identity, earlier)
    answer.facts |= {
        "attempt": number,
        "gpu_hours": found.gpu_hours,
        "cpu_hours": found.cpu_hours,
        "estimate_basis": found.basis,
    }
    text = f"{identity.run_id} would be submitted, as attempt {number}.\n  estimate  {found}"
    return answer.to_json(), _with_changes(text, answer)


def _with_changes(text: str, answer: Answer) -> str:
    if not answer.previous:
        return text
    return "\n".join([text, f"  changed since {answer.previous}:", *(f"    {change}" for change in answer.changed)])


# -- being cancelled


@contextmanager
def _cancellable() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, as CI systems send them, both end what goes on as Ctrl-C does. Yields the signals that came.

    Only the first counts: what follows from it is not to be cut short by the second, which comes some seconds later.
    """
    came: list[int] = []

    def end(number: int, _frame: object) -> None:
        if not came:
            came.append(number)
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cancel(answer: Answer, target: str, store_uri: str | None, options: Options) -> Interrupted:
    """What to raise once a call was cancelled; its run is asked to stop first, where that is wanted."""
    if not answer.run_id:
        return Interrupted("Cancelled before anything was sent.")
    again = "Calling retrain again attaches to it."
    if not options.stop_on_cancel or options.dry_run:
        is_sent = answer.outcome in ("submitted", "attached")
        goes_on = f"{answer.run_id} goes on" if is_sent else f"If {answer.run_id} was sent, it goes on"
        return Interrupted(f"Cancelled. {goes_on}.", next_step=again)
    try:
        store, cluster = find_store(store_uri), find_target(target, store_uri)
        flight = in_flight(store, cluster, answer.run_id)
        if flight is None:
            return Interrupted(f"Cancelled. {answer.run_id} is not running.")
        ask_to_stop(answer.run_id, flight, store, cluster, reason="headway retrain was cancelled")
    except EnvironmentUnusable as e:
        return Interrupted(f"Cancelled, and {answer.run_id} could not be asked to stop: {e}", next_step=again)
    return Interrupted(
        f"Cancelled. {answer.run_id} was asked to save and end.",
        next_step="Calling retrain again goes on from its last checkpoint.",
    )
