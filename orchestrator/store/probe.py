"""Whether an S3 server enforces what Headway's safety rests on."""

from __future__ import annotations

import secrets

from orchestrator.errors import AlreadyExists, StoreError
from orchestrator.store.s3 import Store

_PROBED: set[str] = set()


def require_conditional_writes(store: Store) -> None:
    """Probe once a process that a second conditional create is refused and the first one's bytes stay.

    Raises:
        StoreError: the server ignores ``If-None-Match: *``; Headway would lose data there.
    """
    if store.uri in _PROBED:
        return
    key = f"probe/{secrets.token_hex(8)}"
    next(store.list(key), None)  # names a bucket that is not there; to a write some servers answer AccessDenied
    store.create(key, b"first")
    try:
        try:
            store.create(key, b"second")
        except AlreadyExists:
            if store.get(key) == b"first":
                _PROBED.add(store.uri)
                return
        raise StoreError(
            f"{store.uri}: this S3 server overwrites an object despite If-None-Match: *.",
            next_step="Use one that enforces conditional writes (Amazon S3, SeaweedFS 4, MinIO, Ceph Squid).",
        )
    finally:
        store.delete([key])
