"""Attempts, preparations and target settings for tests of what is rendered."""

from __future__ import annotations

from typing import Any

from orchestrator.document import check
from orchestrator.render import AttemptRequest, PrepareRequest
from orchestrator.spec import ResourcesSpec
from orchestrator.target_settings import TargetSettings

DIGEST = "ab" * 32
MINIMAL = {
    "apiVersion": "headway/v1",
    "kind": "kubernetes",
    "image": "registry.example.com/headway:0.1.0",
    "pools": {"cpu": {"max_pods": 4, "size": {"cpu": "2"}}},
}


def settings(**changes: Any) -> TargetSettings:
    """The smallest ``target.yaml`` with top-level fields replaced."""
    document = {**MINIMAL, **changes}
    return check(TargetSettings, document, source="target.yaml", compare="the example", all_fields="the example")


def attempt(resources: dict[str, Any] | None = None, **changes: Any) -> AttemptRequest:
    """An attempt of one worker with fields replaced."""
    fields: dict[str, Any] = {
        "run_id": "code-lm-1a2b3c4d",
        "attempt": 2,
        "run_file": "run.yaml",
        "version": "0.1.0",
        "package_digest": DIGEST,
        "store_uri": "s3://bucket/prefix",
        "resources": ResourcesSpec.model_validate(resources or {}),
    }
    return AttemptRequest(**{**fields, **changes})


def preparation(**changes: Any) -> PrepareRequest:
    """The making of a dataset with fields replaced."""
    fields: dict[str, Any] = {
        "dataset": "code-lm",
        "fingerprint": "0123456789abcdef",
        "run_file": "run.yaml",
        "version": "0.1.0",
        "package_digest": DIGEST,
        "store_uri": "s3://bucket/prefix",
    }
    return PrepareRequest(**{**fields, **changes})
