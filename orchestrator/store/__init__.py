"""S3, and the one primitive that Headway builds on it: create an object unless it exists."""

from orchestrator.store.attempts import Attempt, claim_attempt
from orchestrator.store.s3 import ObjectInfo, Store, open_store

__all__ = ["Attempt", "ObjectInfo", "Store", "claim_attempt", "open_store"]
