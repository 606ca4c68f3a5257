"""Everything that Headway raises on purpose, with the exit code that the command line gives it.

::

    HeadwayError                  1
    ├── UsageError                2   wrong flags or arguments
    │   └── SpecError             2   the run file: which field, which value, which limit
    ├── RunError                  1   the run cannot go on, and a retry would not change that
    │   ├── GateRefused           3   trained and evaluated, but not good enough to release
    │   └── EmptySource           2   the source of the data names no usable file
    ├── AttemptFailed             1   this attempt failed; the next goes on from the last checkpoint
    │   └── AttemptsUsedUp        1   as many failed as one submission may make
    ├── Fenced                    1   a newer attempt works on this run; this one stops
    ├── IntegrityError            1   bytes that do not match their digest, or a file that lies about itself
    ├── EnvironmentUnusable       4   the machine or the cluster lacks something
    │   ├── StoreError            4   S3 refused, failed, or cannot be reached
    │   │   ├── NotFound          4   no such object
    │   │   └── AlreadyExists     4   a conditional create lost its race
    │   └── TargetError           4   Ray, or the cluster, refused or cannot be reached
    ├── TimedOut                  5   waited as long as was asked
    └── Interrupted             130   Ctrl-C, or a stop that was asked for
        └── Displaced           130   its pod is being ended, so the run is to go on elsewhere

A message says what is wrong in one sentence; ``next_step`` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class HeadwayError(Exception):
    """Base of all errors that a person may see. ``str()`` gives the message and the next step."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message, next_step)
        self.message = message
        self.next_step = next_step
        self.facts: dict[str, object] = {}
        """What else a program that asked for JSON is told. Stays in this process."""

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross Ray's process boundaries: keyword-only arguments need this to survive the trip.
        return (_rebuild, (type(self), self.message, self.next_step))


def _rebuild(cls: type[HeadwayError], message: str, next_step: str) -> HeadwayError:
    return cls(message, next_step=next_step)


class UsageError(HeadwayError):
    exit_code = 2


class SpecError(UsageError):
    pass


class RunError(HeadwayError):
    pass


class GateRefused(RunError):
    exit_code = 3


class EmptySource(RunError):
    exit_code = 2


class AttemptFailed(HeadwayError):
    pass


class AttemptsUsedUp(AttemptFailed):
    pass


class Fenced(HeadwayError):
    pass


class IntegrityError(HeadwayError):
    pass


class EnvironmentUnusable(HeadwayError):
    exit_code = 4


class StoreError(EnvironmentUnusable):
    pass


class NotFound(StoreError):
    pass


class AlreadyExists(StoreError):
    pass


class TargetError(EnvironmentUnusable):
    pass


class TimedOut(HeadwayError):
    exit_code = 5


class Interrupted(HeadwayError):
    exit_code = 130


class Displaced(Interrupted):
    pass
