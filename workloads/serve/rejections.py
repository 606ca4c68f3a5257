"""Tells the webhook of the run that made a version that the server has rejected it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from orchestrator.errors import HeadwayError, NotFound
from orchestrator.record import notice
from orchestrator.record.notify import Delivery, notify
from orchestrator.release.versions import read_version
from orchestrator.spec import NotifySpec
from orchestrator.store import Store, layout

logger = logging.getLogger("headway.serve")


def in_background(store: Store, model: str, channel: str) -> Callable[[int, str], None]:
    """Takes a version's number and the reason, and returns at once: a slow webhook holds up no replica."""

    def tell(number: int, reason: str) -> None:
        arguments = (store, model, channel, number, reason)
        threading.Thread(target=tell_rejected, args=arguments, name="rejection", daemon=True).start()

    return tell


def tell_rejected(
    store: Store, model: str, channel: str, number: int, reason: str, *, environ: Mapping[str, str] = os.environ
) -> Delivery | None:
    """Tell what ``notify`` of the run's first submission names; None where it names nothing, or was told before.

    Best effort: what goes wrong is logged.
    """
    try:
        run_id = read_version(store, model, number).run_id
        settings = _settings(store, run_id)
    except (HeadwayError, ValidationError) as e:
        logger.warning("Whom to tell that %s@%d is rejected is not known: %s", model, number, e)
        return None
    told = notice.rejected(run_id, model, number, channel=channel, reason=reason)
    return notify(settings, told, store, environ=environ)


def _settings(store: Store, run_id: str) -> NotifySpec | None:
    try:
        found = store.get_json(layout.run_spec(run_id)).get("spec", {}).get("notify")
    except NotFound:  # a version that no run of this store made
        return None
    return None if found is None else NotifySpec.model_validate(found)
