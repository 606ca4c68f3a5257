"""Before Kubernetes ends a head pod (its preStop): the attempt in it saves, and goes on in another pod later."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.errors import HeadwayError
from orchestrator.release.outcome import read_outcome
from orchestrator.store import Store
from orchestrator.store.attempts import POD_ENDS, attempt_end, newest_attempt, read_attempt, request_stop

POLL_S = 0.5


def save_and_stop(
    store: Store,
    run_id: str,
    *,
    job: str,
    timeout_s: float,
    say: Callable[[str], None],
    pod: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Ask the job's attempt to save and end, and wait until it has. Returns what came of it, in a sentence.

    A store that fails is asked again until the time is over: nobody reads an error of a pod that goes away.
    """
    deadline = clock() + timeout_s
    asked: int | None = None
    trouble = ""
    while True:
        try:
            if asked is None:
                asked = _in_flight(store, run_id, job, pod)
                if asked is None:
                    return f"No attempt of {run_id} goes on as {job}; there is nothing to save."
                request_stop(store, run_id, asked, reason=POD_ENDS)
                say(f"Attempt {asked} of {run_id} is asked to save and end: {POD_ENDS}.")
            ended = _ended(store, run_id, asked)
            if ended:
                return ended
        except HeadwayError as e:
            if e.message != trouble:
                say(f"Asked again until the time is over: {e.message}")
            trouble = e.message
        if clock() >= deadline:
            return f"{run_id} did not end within {timeout_s:.0f} s; it goes on from its last checkpoint."
        wait(POLL_S)


def _in_flight(store: Store, run_id: str, job: str, pod: str | None) -> int | None:
    """The newest attempt, where it is this job's, in this pod, and has not ended.

    An older one is fenced: it has nothing to save. A pod that comes back late must not stop the one that replaced it,
    whose job is the same.
    """
    number = newest_attempt(store, run_id)
    facts = read_attempt(store, run_id, number) if number else {}
    if facts.get("job") != job or (pod is not None and facts.get("host") != pod):
        return None
    if attempt_end(store, run_id, number) is not None or read_outcome(store, run_id) is not None:
        return None
    return number


def _ended(store: Store, run_id: str, number: int) -> str | None:
    end = attempt_end(store, run_id, number)
    if end is not None:
        return f"Attempt {number} of {run_id} ended ({end['state']}): {end['reason'] or 'it is finished'}"
    newest = newest_attempt(store, run_id)
    if newest != number:
        return f"Attempt {newest} of {run_id} has taken over from attempt {number}."
    return None
