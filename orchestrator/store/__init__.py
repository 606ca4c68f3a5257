"""S3, and the one primitive that Headway builds on it: create an object unless it exists."""

from orchestrator.store.attempts import Attempt, WorkerGroup, claim_attempt, claim_group
from orchestrator.store.s3 import ObjectInfo, Store, open_store

__all__ = ["Attempt", "ObjectInfo", "Store", "WorkerGroup", "claim_attempt", "claim_group", "open_store"]
