"""The config.json of the pretrained model that a run file names, without fetching its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import HeadwayError, NotFound
from orchestrator.pretrained.format import read_base
from orchestrator.pretrained.source import is_gguf, list_base
from orchestrator.spec import ModelSpec
from orchestrator.store import Store
from orchestrator.store.s3 import split_uri

_NAME = "config.json"


class Unknown(Exception):
    """Why the config cannot be told here; its text goes to people."""


def read_base_config(model: ModelSpec, store: Store | None) -> dict[str, Any]:
    """Read it from where it lies; of the hub and of a GGUF file, which holds none, from the base that was made of it.

    Args:
        store: None where none is set.

    Raises:
        Unknown: it was not fetched yet, or cannot be read.
    """
    uri = str(model.pretrained)
    try:
        if uri.startswith("hf://") or is_gguf(uri):
            data = _fetched(model, store)
        elif uri.startswith("s3://"):
            bucket, key = split_uri(uri)
            data = _require(store).at(bucket).get(f"{key}/{_NAME}" if key else _NAME)
        else:
            data = (Path(uri).expanduser() / _NAME).read_bytes()
        config = json.loads(data)
    except (OSError, ValueError, HeadwayError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise Unknown(f"{_NAME} of {uri} cannot be read: {reason}") from e
    if not isinstance(config, dict):
        raise Unknown(f"{_NAME} of {uri} is no JSON object")
    return config


def _fetched(model: ModelSpec, store: Store | None) -> bytes:
    there = _require(store)
    uri = str(model.pretrained)
    try:
        base = read_base(there, list_base(uri, there, trust_remote_code=model.trust_remote_code).fingerprint)
    except NotFound as e:
        raise Unknown(f"{uri} was not fetched into the store yet, which the run does first") from e
    return there.get(base.prefix + _NAME)


def _require(store: Store | None) -> Store:
    if store is None:
        raise Unknown(
            "no store is set (--store, HEADWAY_STORE, or headway up) to read the pretrained model's config by"
        )
    return store
