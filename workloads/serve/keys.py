"""API keys: who may ask. The server knows digests alone."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping

from orchestrator.errors import EnvironmentUnusable
from workloads.serve.openai_api import ApiError

KEYS_VARIABLE = "HEADWAY_API_KEYS"
"""SHA-256 of each key that may ask, 64 hex digits, with commas between. Not set: everybody may."""


class ApiKeys:
    """The keys that may ask."""

    def __init__(self, digests: tuple[str, ...] | None) -> None:
        """``None`` lets everybody ask."""
        self._digests = digests

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ApiKeys:
        """
        Raises:
            EnvironmentUnusable: the variable holds something else than digests, or nothing.
        """
        if KEYS_VARIABLE not in environment:
            return cls(None)
        digests = tuple(part.strip().lower() for part in environment[KEYS_VARIABLE].split(","))
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests):
            raise EnvironmentUnusable(
                f"{KEYS_VARIABLE} holds something else than SHA-256 digests of 64 hex digits with commas between.",
                next_step="Make a digest with: printf %s KEY | sha256sum",
            )
        return cls(digests)

    def require(self, authorization: str) -> None:
        """
        Args:
            authorization: the header, ``Bearer KEY``.

        Raises:
            ApiError: 401, the key is missing or not one of them.
        """
        if self._digests is None:
            return
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        # All of them are compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
