"""From a version in the store to an engine that has answered once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.release.download import download_version
from orchestrator.release.versions import Version
from orchestrator.store import Store
from workloads.adapter import download_base
from workloads.serve import memory
from workloads.serve.admission import EngineSettings
from workloads.serve.classifier import Classifier
from workloads.serve.engine import Engine
from workloads.serve.engines import load_engine
from workloads.serve.warm_up import warm_up


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A version whose files are on this node."""

    version: Version
    directory: Path
    base: Path | None = None
    """The pretrained model's, where the version is an adapter."""


class Models(Protocol):
    """How a follower comes to engines. All of it runs in the follower's thread."""

    def fetch(self, version: Version) -> Fetched:
        """
        Raises:
            IntegrityError, NotFound: the version is not whole. EnvironmentUnusable: not now.
        """
        ...

    def needed_bytes(self, fetched: Fetched) -> int:
        """What it takes in memory, about."""
        ...

    def free_bytes(self) -> int: ...

    def load(self, fetched: Fetched) -> Engine | Classifier:
        """Raises whatever its files make a foreign library raise."""
        ...

    def warm_up(self, engine: Engine | Classifier) -> float:
        """Seconds that its first answer took.

        Raises:
            NonFiniteLogits: it is broken. TooSlow: it took longer than it may.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StoredModels:
    """Versions of a store, through this node's cache."""

    store: Store
    cache_directory: Path
    engine: EngineSettings
    max_warm_up_s: float

    def fetch(self, version: Version) -> Fetched:
        directory = download_version(self.store, version, self.cache_directory / "versions")
        base = None if version.base is None else download_base(self.store, version.base, self.cache_directory)
        return Fetched(version=version, directory=directory, base=base)

    def needed_bytes(self, fetched: Fetched) -> int:
        return memory.needed_bytes([fetched.directory, *([fetched.base] if fetched.base else [])])

    def free_bytes(self) -> int:
        return memory.free_bytes()

    def load(self, fetched: Fetched) -> Engine | Classifier:
        return load_engine(fetched.version, fetched.directory, self.engine, base=fetched.base)

    def warm_up(self, engine: Engine | Classifier) -> float:
        return warm_up(engine, max_s=self.max_warm_up_s)
