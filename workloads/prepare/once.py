"""Objects of a preparation, which whoever makes the same dataset makes with the same bytes."""

from __future__ import annotations

from orchestrator.errors import AlreadyExists, IntegrityError
from orchestrator.store import Store

DELETE = "Delete the folder of this preparation, which has no manifest yet, and prepare again."


def create_alike(store: Store, key: str, content: bytes) -> None:
    """Create an object, or find these bytes there, where an earlier try got this far.

    Raises:
        IntegrityError: there are others. An earlier try may have had other versions of transformers or tokenizers.
    """
    try:
        store.create(key, content)
    except AlreadyExists as e:
        raise IntegrityError(
            f"{store.uri_of(key)} has other bytes than are made now: an interrupted preparation left it, by other "
            "versions of Headway or of its packages.",
            next_step=DELETE,
        ) from e
