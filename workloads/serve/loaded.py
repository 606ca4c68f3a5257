"""A version that answers, and which of them do."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.release.versions import Version
from workloads.serve.classifier import Classifier
from workloads.serve.counters import Counter
from workloads.serve.engine import Engine
from workloads.serve.openai_api import ApiError


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A version that answers. It stays in memory as long as a request holds it."""

    version: Version
    engine: Engine | Classifier
    counter: Counter = field(default_factory=Counter)

    def generator(self) -> Engine:
        """
        Raises:
            ApiError: 400, this version gives classes.
        """
        if not isinstance(self.engine, Classifier):
            return self.engine
        raise ApiError(
            400, f"{self.version.model} classifies texts and generates none; use /v1/classify.", code="unsupported"
        )

    def classifier(self) -> Classifier:
        """
        Raises:
            ApiError: 400, this version generates text.
        """
        if isinstance(self.engine, Classifier):
            return self.engine
        raise ApiError(
            400, f"{self.version.model} generates text and gives no classes; use /v1/completions.", code="unsupported"
        )


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What one replica answers with; replaced as a whole, so that a request sees one state."""

    stable: Loaded | None = None
    canary: Loaded | None = None
    weight: float = 0.0
    """The canary's share of the requests."""
    draining: bool = False
    """Nothing is loaded for now, and other replicas answer."""

    def versions(self) -> tuple[Loaded, ...]:
        return tuple(loaded for loaded in (self.stable, self.canary) if loaded is not None)

    def find(self, number: int | None) -> Loaded | None:
        return next((loaded for loaded in self.versions() if loaded.version.number == number), None)
