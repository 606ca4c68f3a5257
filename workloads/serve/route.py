"""Which of two versions answers a request. Pure, so that one user stays with one version on every replica."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

SESSION_HEADERS = ("x-session-id", "x-request-id")
"""What tells users apart where the request names no ``user``, first come first."""


def share_key(body: bytes, headers: Mapping[str, str], *, otherwise: str) -> str:
    """What a request is told apart by: its ``user``, else a session's or its own id, else ``otherwise``."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):  # refused by whichever version gets it
        document = None
    user = document.get("user") if isinstance(document, dict) else None
    if isinstance(user, str) and user:
        return user
    return next((headers[name] for name in SESSION_HEADERS if headers.get(name)), otherwise)


def takes_canary(key: str, *, version: int, weight: float) -> bool:
    """Whether the canary answers. With another canary it is other keys that it answers."""
    digest = hashlib.sha256(f"{version}:{key}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8]) < weight * 2**64
