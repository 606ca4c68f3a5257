"""One version under vLLM, as a deployment of ``ray.serve.llm``. Imported only where vLLM is installed."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment

from orchestrator.node_cache import cache_directory
from orchestrator.release.download import download_version
from orchestrator.release.versions import read_version
from orchestrator.store import open_store


class VersionServer(LLMServer):  # type: ignore[misc]
    """Fetches the version to its own node, verified, before vLLM reads the first byte."""

    async def __init__(self, llm_config: Any, *, version: dict[str, Any]) -> None:  # type: ignore[misc]  # as its base
        await asyncio.to_thread(_fetch, **version)
        await super().__init__(llm_config)


def _fetch(store: str, model: str, number: int) -> None:
    """To the folder that ``model_source`` names: it follows from the version's digest, and is the same on all nodes."""
    found = open_store(store)
    download_version(found, read_version(found, model, number), cache_directory() / "versions")


def build(arguments: dict[str, Any], version: dict[str, Any]) -> Any:
    """The application of one version.

    Args:
        arguments: of ``LLMConfig``.
        version: of :func:`_fetch`.
    """
    return build_llm_deployment(LLMConfig(**arguments), deployment_cls=VersionServer, bind_kwargs={"version": version})
