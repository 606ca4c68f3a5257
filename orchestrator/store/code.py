"""The submitted working directories: ``code/<digest>.zip``, one object for all runs that are made of the same files.

The digest is of the files, not of the zip, whose bytes differ from one release of zlib to the next. So an object that
is there already is never compared, and what is read is checked when it is unpacked (``orchestrator/package.py``).
"""

from __future__ import annotations

import contextlib
import re

from orchestrator.errors import AlreadyExists, IntegrityError, StoreError, UsageError
from orchestrator.store import layout
from orchestrator.store.s3 import Store

_DIGEST = re.compile(r"[0-9a-f]{64}")


def upload_code(store: Store, *, digest: str, data: bytes) -> None:
    """Store a package's zip, unless one of the same digest is there.

    Raises:
        StoreError: S3 refused or failed.
    """
    key = layout.code(digest)
    if store.exists(key):
        return
    with contextlib.suppress(AlreadyExists):  # another submission of the same files came first
        store.upload(key, data, once=True)


def read_code(store: Store, digest: str, *, max_bytes: int) -> bytes:
    """A package's zip, unchecked but for its size.

    Raises:
        UsageError: this is no digest. StoreError: it is not there, or S3 failed. IntegrityError: above ``max_bytes``.
    """
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"{digest!r} is not the digest of a code package: 64 hex digits.")
    key = layout.code(digest)
    size_bytes = next((item.size_bytes for item in store.list(key)), None)
    if size_bytes is None:
        raise StoreError(
            f"{store.uri_of(key)}: there is no such code package.", next_step="Submitting the run again uploads it."
        )
    if size_bytes > max_bytes:
        raise IntegrityError(f"{store.uri_of(key)} has {size_bytes} bytes; the limit is {max_bytes}.")
    return store.get(key)
