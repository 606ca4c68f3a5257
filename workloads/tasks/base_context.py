"""The pretrained model that a run starts from, as its task sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.node_cache import cache_directory
from orchestrator.pretrained.assets import fetch_assets
from orchestrator.pretrained.format import BaseManifest, read_base
from orchestrator.spec import RunSpec
from orchestrator.store import Store


@dataclass(frozen=True, kw_only=True)
class BaseContext:
    """Its small files on this node, and where its weights are to be found."""

    directory: Path
    """Config, tokenizer, chat template; no weights."""
    manifest: BaseManifest
    trust_remote_code: bool = False
    """Whether Python code in ``directory`` may run."""


def base_context(spec: RunSpec, store: Store, base_fingerprint: str) -> BaseContext | None:
    """The run's pretrained model, its small files fetched to this node's cache; None for a run from scratch.

    Args:
        base_fingerprint: of the base, which is in the store by now.

    Raises:
        NotFound: it is not. IntegrityError: it is damaged. EnvironmentUnusable: the cache cannot be written.
    """
    if spec.model.pretrained is None:
        return None
    manifest = read_base(store, base_fingerprint)
    return BaseContext(
        directory=fetch_assets(store, manifest, cache_directory() / "bases"),
        manifest=manifest,
        trust_remote_code=spec.model.trust_remote_code,
    )
