"""The users of the test cluster's S3 server, with the rights that ``k8s/s3`` gives to each role.

SeaweedFS enforces IAM policies, but not all conditions: it knows neither ``s3:if-none-match`` nor
``s3:ObjectCreationOperation`` and takes ``…IfExists`` for unmet (measured with 4.48). So a statement loses the first
two, which leaves it wider, and a statement that denies by them is left out, as ``k8s/README.md`` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.targets.seaweedfs import Keys, new_keys
from tests.cluster.layout import BUCKET, REPOSITORY

ADMIN = "admin"
"""May do everything: makes the bucket, and stands for a person's own keys."""
USERS: Mapping[str, tuple[str, ...]] = {
    "trainer": ("trainer", "releaser"),  # the tests' runs release what they train
    "releaser": ("releaser",),
    "server": ("server",),
    "submitter": ("submitter",),
}
"""Which policies of ``k8s/s3`` each user has."""
_ANY_PREFIX = "*"
"""Each test has a store of its own in the bucket."""
_DEMO_DATA = "demo/*"
"""The demo's text lies beside the stores, where a run reads it by ``data.source``."""


def new_users() -> dict[str, Keys]:
    """Keys for every user."""
    return {name: new_keys() for name in (ADMIN, *USERS)}


def server_config(users: Mapping[str, Keys]) -> dict[str, Any]:
    """What SeaweedFS reads with ``-s3.config``."""
    identities = [_identity(ADMIN, users[ADMIN], actions=["Admin", "Read", "Write", "List", "Tagging"])]
    identities += [_identity(name, users[name], policyNames=list(roles)) for name, roles in USERS.items()]
    policies = {role: _policy(role) for roles in USERS.values() for role in roles}
    return {
        "identities": identities,
        "policies": [{"name": role, "content": json.dumps(document)} for role, document in policies.items()],
    }


def _identity(name: str, keys: Keys, **rights: list[str]) -> dict[str, Any]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    return {"name": name, "credentials": credentials, **rights}


def _policy(role: str) -> dict[str, Any]:
    text = (REPOSITORY / "k8s" / "s3" / f"{role}.json").read_text()
    document = json.loads(text.replace("BUCKET", BUCKET).replace("PREFIX", _ANY_PREFIX))
    statements = [_enforceable(each) for each in document["Statement"] if each["Effect"] == "Allow"]
    if role == "trainer":
        objects, bucket = f"arn:aws:s3:::{BUCKET}/{_DEMO_DATA}", f"arn:aws:s3:::{BUCKET}"
        statements.append({"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": [objects]})
        listing = {"StringLike": {"s3:prefix": [_DEMO_DATA]}}
        statements.append({"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [bucket], "Condition": listing})
    return {"Version": document["Version"], "Statement": statements}


def _enforceable(statement: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in statement.items() if key != "Condition"}
    prefixes = statement.get("Condition", {}).get("StringLikeIfExists")
    return {**kept, "Condition": {"StringLike": prefixes}} if prefixes else kept
