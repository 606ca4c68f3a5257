"""Posts notices to a webhook, each once, and never in the run's way.

The claim of a notice comes before the post, as a conditional create under ``runs/<run>/notices/``: of a retry, a second
submission and several processes one sends it. A sender that dies in between leaves it unsent; none is sent twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from orchestrator import __version__
from orchestrator.errors import AlreadyExists, HeadwayError
from orchestrator.record.notice import SIGNATURE_HEADER, Notice, signature
from orchestrator.spec import NotifySpec, check_webhook
from orchestrator.spec.operation import LOOPBACK
from orchestrator.store import Store, layout

logger = logging.getLogger(__name__)
SECRET_VARIABLE = "HEADWAY_WEBHOOK_SECRET"
TIMEOUT_S = 10.0
WAITS_S = (1.0, 4.0)
"""Between the tries, of which there is one more."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What became of a notice. Names the host alone: the rest of a webhook's address is often its secret."""

    event: str
    host: str
    delivered: bool
    tries: int
    error: str = ""

    def fields(self) -> dict[str, Any]:
        """Of the run's ``notice`` event."""
        return {("what" if name == "event" else name): value for name, value in asdict(self).items()}


def notify(
    settings: NotifySpec | None,
    notice: Notice,
    store: Store,
    *,
    environ: Mapping[str, str],
    timeout_s: float = TIMEOUT_S,
    wait: Callable[[float], object] = time.sleep,
) -> Delivery | None:
    """Tell the webhook, unless it wants no such notice or was told already; then None.

    Raises nothing: what goes wrong is in the answer, and in the log.

    Args:
        environ: holds the address, where the settings name a variable, and HEADWAY_WEBHOOK_SECRET, to sign with.
        timeout_s: of one try: to connect, to send and to answer, each.
    """
    if settings is None or notice.event not in settings.events:
        return None
    url = settings.webhook or environ.get(settings.webhook_env or "", "")
    try:
        check_webhook(url)
        host = urlsplit(url).hostname or ""
        if not _claim(store, notice, host):
            return None
    except ValueError as e:
        where = f"the variable {settings.webhook_env}" if settings.webhook_env else "notify.webhook"
        what = f"{where} {e}" if url else f"{where} is not set where the notice is sent from"
        return _told(notice, Delivery(event=notice.event, host="", delivered=False, tries=0, error=what))
    except HeadwayError as e:
        return _told(notice, Delivery(event=notice.event, host="", delivered=False, tries=0, error=str(e)))
    body = notice.body(store=store.uri, time_s=time.time())
    tries, error = _post(url, body, _headers(notice, body, environ), timeout_s=timeout_s, wait=wait)
    return _told(notice, Delivery(event=notice.event, host=host, delivered=not error, tries=tries, error=error))


def _claim(store: Store, notice: Notice, host: str) -> bool:
    """Whether this notice is ours to send."""
    claim = {"event": notice.event, "host": host, "claimed_s": time.time(), "nonce": secrets.token_hex(4)}
    try:
        store.create_json(layout.notice(notice.run_id, notice.claim), claim)
    except AlreadyExists:
        return False
    return True


def _headers(notice: Notice, body: bytes, environ: Mapping[str, str]) -> dict[str, str]:
    secret = environ.get(SECRET_VARIABLE, "")
    return {
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": f"headway/{__version__}",
        "Headway-Event": notice.event,
        **({SIGNATURE_HEADER: signature(body, secret)} if secret else {}),
    }


def _post(
    url: str, body: bytes, headers: dict[str, str], *, timeout_s: float, wait: Callable[[float], object]
) -> tuple[int, str]:
    """(tries, why the last one failed, or nothing)."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, and with them the secret in them
    error = ""
    for number, wait_s in enumerate((*WAITS_S, None), start=1):
        error, passing = _try(url, body, headers, timeout_s)
        if not error or not passing or wait_s is None:
            return number, error
        wait(wait_s)
    return len(WAITS_S) + 1, error


def _try(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> tuple[str, bool]:
    """(what went wrong, or nothing; whether another try may help). No redirect is followed: it may lead anywhere."""
    # A proxy of the environment is for the world outside.
    is_local = urlsplit(url).hostname in LOOPBACK
    try:
        with (
            httpx.Client(timeout=timeout_s, follow_redirects=False, trust_env=not is_local) as client,
            client.stream("POST", url, content=body, headers=headers) as answer,
        ):
            status = answer.status_code
    except httpx.TransportError as e:
        return f"{type(e).__name__}: {e}", True
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as e:
        return f"it cannot be sent there ({type(e).__name__})", False  # their words may quote the address
    if answer.is_success:
        return "", False
    if answer.is_redirect:
        return f"it answered {status}, a redirect, which is not followed", False
    return f"it answered {status}", status in _PASSING


def _told(notice: Notice, delivery: Delivery) -> Delivery:
    if delivery.error:
        at = f" at {delivery.host}" if delivery.host else ""
        logger.warning("The webhook%s was not told that %s: %s", at, notice.sentence, delivery.error)
    return delivery
