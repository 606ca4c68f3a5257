"""The token shown to a Ray cluster that asks for one, from where Ray's own programs look for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
MODE_VARIABLE = "RAY_AUTH_MODE"


def is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def token_for(host: str, environ: Mapping[str, str]) -> str:
    """The token to show to a Ray cluster, or an empty string.

    The file's token is this machine's own, so it is shown to no other; the variable's goes anywhere.
    """
    if chosen := environ.get(TOKEN_VARIABLE, ""):
        return chosen
    if not is_loopback(host):
        return ""
    try:
        return token_path(environ).read_text().strip()
    except OSError:
        return ""


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_path(environ: Mapping[str, str]) -> Path:
    return Path(environ.get(PATH_VARIABLE) or Path.home() / ".ray" / "auth_token")
