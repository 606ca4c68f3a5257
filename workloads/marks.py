"""What an attempt leaves in its run's folder as it begins, and where it ends without an outcome."""

from __future__ import annotations

import logging
from contextlib import suppress

from orchestrator import __version__
from orchestrator.dataset.listing import keep_listing
from orchestrator.errors import AlreadyExists, HeadwayError, Interrupted
from orchestrator.record import EventLog
from orchestrator.runs import RunIdentity
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, layout
from orchestrator.store.attempts import end_attempt

logger = logging.getLogger(__name__)


def record_spec(store: Store, spec: RunSpec, identity: RunIdentity) -> None:
    """Say what the run is made of: its run file as understood, and the files of its source in S3."""
    facts = {
        "spec": spec.model_dump(mode="json"),
        "run_id": identity.run_id,
        "edition": identity.edition,
        "dataset_fingerprint": identity.dataset_fingerprint,
        "code_digest": identity.code_digest,
        "base_fingerprint": identity.base.fingerprint if identity.base is not None else "",
        "headway": __version__,
    }
    with suppress(AlreadyExists):  # the first one stands; later ones differ only in what does not change the weights
        store.create_json(layout.run_spec(identity.run_id), facts)
    keep_listing(store, identity.run_id, identity.files)


def record_end(store: Store, attempt: Attempt, events: EventLog, error: BaseException) -> None:
    """Say how an attempt ended that reached no outcome."""
    interrupted = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
    state, reason = ("stopped" if interrupted else "failed"), str(error) or type(error).__name__
    exit_code = error.exit_code if isinstance(error, HeadwayError) else 1
    events.append("attempt_ended", state=state, reason=reason, exit_code=exit_code)
    try:
        end_attempt(store, attempt, state=state, reason=reason)
    except HeadwayError as e:
        logger.warning("How attempt %d ended could not be recorded: %s", attempt.number, e)
