"""One HTTP request to a server of this machine, for asking whether it is up.

Not httpx: its connection pool can hang for good where a Ctrl-C arrives inside its lock, and importing it costs 0.1 s.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    text: str


def ask(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 5.0,
) -> Answer | None:
    """The answer, or None where there is none: refused, cut off, too late."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        got = connection.getresponse()
        return Answer(status=got.status, text=got.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
