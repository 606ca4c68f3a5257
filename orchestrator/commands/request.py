"""The one object that ``plan --manifests`` prints and ``submit`` sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import Interrupted, SpecError
from orchestrator.package import Package, package
from orchestrator.render import AttemptRequest, submission_id
from orchestrator.reporter import Reporter
from orchestrator.runs import RunIdentity, identify
from orchestrator.spec import RunSpec
from orchestrator.store import Store
from orchestrator.store.attempts import newest_attempt
from orchestrator.targets.base import Request, Submission, Target


@dataclass(frozen=True, kw_only=True)
class Prepared:
    identity: RunIdentity
    attempt: int
    """The number that the job claims, unless another comes first."""
    request: Request
    package: Package


def build_request(
    spec: RunSpec,
    run_file: Path,
    store: Store,
    target: Target[Any],
    *,
    directory: Path,
    identity: RunIdentity | None = None,
) -> Prepared:
    """What would be sent now: the job, and the working directory ``directory``, which must hold the run file.

    Args:
        identity: of the run, where it was found out before.

    Raises:
        SpecError: the run file lies outside the working directory. Besides, all that identifying the run raises.
    """
    relative = relative_to(directory, run_file)
    identity = identity or identify(spec, store, directory)
    packed = package(directory)
    attempt = newest_attempt(store, identity.run_id) + 1
    request = target.render(
        AttemptRequest(
            run_id=identity.run_id,
            attempt=attempt,
            repeat=free_repeat(target, identity.run_id, attempt),
            run_file=relative,
            edition=identity.edition,
            version=__version__,
            package_digest=packed.digest,
            store_uri=store.uri,
            resources=spec.resources,
            env=spec.env,
            secrets=spec.secrets,
        )
    )
    return Prepared(identity=identity, attempt=attempt, request=request, package=packed)


@contextmanager
def sending(job: str, *, next_step: str) -> Iterator[None]:
    """Around the sending of a job: Ctrl-C there leaves it open whether the job goes on, and says so."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"Interrupted while it was being sent; {job} goes on where it was submitted.", next_step=next_step
        ) from e


def hand_over(what: str, request: Request, packed: Package, target: Target[Any], reporter: Reporter) -> Submission:
    """Submit a job with the working directory, and tell which it is and what was not sent.

    Args:
        what: the run, or the dataset, that it is for.
    """
    for skipped in packed.skipped:
        reporter.say(f"not sent: {skipped}")
    submission = target.submit(request, packed)
    verb = "submitted" if submission.created else "was submitted by another just now; attached"
    reporter.say(f"{what} {verb} as {submission.submission_id}")
    return submission


def relative_to(directory: Path, run_file: Path) -> str:
    """The run file's path in the working directory.

    Raises:
        SpecError: it lies outside of it.
    """
    try:
        return run_file.resolve().relative_to(directory.resolve()).as_posix()
    except ValueError as e:
        raise SpecError(
            f"The run file {run_file} lies outside the working directory {directory}, which is what is sent.",
            next_step="Change to a directory that holds it.",
        ) from e


def free_repeat(target: Target[Any], run_id: str, attempt: int) -> int:
    """The first submission id of this attempt number that no ended job has: Ray takes each id once."""
    repeat = 0
    while (found := target.find(submission_id(run_id, attempt, repeat=repeat))) is not None and found.over:
        repeat += 1
    return repeat
