"""Which engine answers for a version: its task decides."""

from __future__ import annotations

from pathlib import Path

from orchestrator.release.versions import Version
from workloads.serve.admission import EngineSettings
from workloads.serve.classifier import Classifier, TransformersClassifier
from workloads.serve.engine import Engine
from workloads.serve.loading import classifies
from workloads.serve.transformers_engine import TransformersEngine


def load_engine(
    version: Version, directory: Path, settings: EngineSettings, *, base: Path | None = None
) -> Engine | Classifier:
    """The version of ``directory``, loaded and warmed up.

    Args:
        base: the pretrained model's directory, where the version is an adapter.

    Raises:
        IntegrityError, NonFiniteLogits: it is no model that answers.
    """
    if classifies(version, directory):
        return TransformersClassifier.load(directory, settings, base=base)
    return TransformersEngine.load(directory, settings, base=base)
