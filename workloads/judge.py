"""Whether an exported model may be released: its evaluation, the version to beat on the same samples, and the gate.

What was found stands in the run's folder, so that a second attempt decides by the same figures.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import AlreadyExists, AttemptFailed, IntegrityError, NotFound, RunError, SpecError
from orchestrator.release import channels
from orchestrator.release.bootstrap import Interval, paired_interval
from orchestrator.release.gate import Comparison, GateDecision, Serving, decide
from orchestrator.release.versions import Version, first_fault, read_version
from orchestrator.release.way_back import Verdicts, in_force
from orchestrator.spec import ReleaseSpec, RunSpec
from orchestrator.store import Store, layout
from workloads.cluster import own_errors
from workloads.evaluate import Blocks, Evaluation, ModelFiles, evaluate, evaluate_files
from workloads.export import Export
from workloads.tasks import BaseContext

logger = logging.getLogger(__name__)


class _Note(Protocol):
    def __call__(self, kind: str, **facts: Any) -> object: ...


class Compared(BaseModel):
    """``against-00004.json``: the version to beat on this run's held-out samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headway/comparison/1"] = "headway/comparison/1"
    version: int
    blocks: Blocks


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Of one run's exported model."""

    spec: RunSpec
    store: Store
    run_id: str
    dataset: DatasetManifest
    base: BaseContext | None
    note: _Note
    """Records an event."""
    say: Callable[[str], None]
    evaluate_files: Callable[[RunSpec, Store, DatasetManifest, ModelFiles, BaseContext | None], Evaluation] = (
        evaluate_files
    )
    """Evaluates another version, on the cluster."""

    def evaluation(self, exported: Export) -> Evaluation:
        """The model's figures, found once.

        Raises:
            RunError: one of them is not a finite number.
        """
        standing = read_evaluation(self.store, self.run_id)
        if standing is not None:
            return standing
        found = evaluate(self.spec, self.store, self.dataset, exported, self.base)
        broken = {name: value for name, value in found.figures.items() if not math.isfinite(value)}
        if broken:
            raise RunError(f"The exported model's evaluation is not finite: {broken}.")
        self.note("evaluation", **found.figures)
        if found.answers:
            self.note("samples", samples=list(found.answers))
        try:
            self.store.create_json(layout.evaluation(self.run_id), found.model_dump(mode="json"))
        except AlreadyExists:
            return read_evaluation(self.store, self.run_id) or found
        return found

    def decide(self, evaluation: Evaluation) -> tuple[GateDecision, Serving | None]:
        """Hold the evaluation against the gate, and against the version to beat where the gate asks for that."""
        serving = None
        if self.spec.release and self.spec.gate.must_beat_serving:
            serving = self._serving(self.spec.release, evaluation)
        decision = decide(self.spec.gate, evaluation=evaluation.figures, serving=serving)
        self.note("gate", passed=decision.passed, reasons=list(decision.reasons))
        return decision, serving

    def _serving(self, release: ReleaseSpec, evaluation: Evaluation) -> Serving | None:
        version = version_to_beat(self.store, release, but_for=self.run_id)
        if version is None:
            return None
        return Serving(
            version=version.number,
            evaluation=version.evaluation,
            same_split=version.dataset.fingerprint == self.dataset.fingerprint,
            comparison=self._comparison(version, evaluation.blocks),
        )

    def _comparison(self, version: Version, mine: Blocks) -> Comparison | None:
        """Both models on the same samples; None where the other one cannot take them."""
        unlike = why_not_comparable(self.spec, self.dataset, version)
        if not mine.losses:
            unlike = unlike or "this run's evaluation has no losses by blocks"
        if unlike:
            self.say(f"{version.name} is compared by its recorded figures: {unlike}.")
            return None
        try:
            theirs = self._blocks_of(version)
        except (SpecError, RunError, AttemptFailed, IntegrityError, NotFound) as e:
            # Its weights are gone, damaged, or fit no model of this run: a release must not hang on that.
            logger.warning("%s could not be evaluated: %s", version.name, e)
            self.say(f"{version.name} is compared by its recorded figures, since it cannot be evaluated: {e.message}")
            return None
        if theirs.num_targets != mine.num_targets:
            self.say(f"{version.name} is compared by its recorded figures: other samples were evaluated then.")
            return None
        num_targets = sum(mine.num_targets)
        found = Comparison(
            mine=sum(mine.losses) / num_targets,
            theirs=sum(theirs.losses) / num_targets,
            num_blocks=len(mine.losses),
            interval=paired_interval(mine.losses, theirs.losses, mine.num_targets),
        )
        self._tell(version, found, found.interval)
        return found

    def _tell(self, version: Version, found: Comparison, interval: Interval | None) -> None:
        between = f", between {interval.low:+.4g} and {interval.high:+.4g}" if interval else ""
        self.say(
            f"On the same samples the loss is {found.mine:.6g}, and {version.name}'s {found.theirs:.6g}: "
            f"a difference of {found.mine - found.theirs:+.4g}{between}"
        )

    def _blocks_of(self, version: Version) -> Blocks:
        """The version's losses on this run's samples, found once."""
        key = layout.comparison(self.run_id, version.number)
        try:
            return Compared.model_validate(self.store.get_json(key)).blocks
        except NotFound:
            pass
        except ValidationError as e:
            raise IntegrityError(f"{self.store.uri_of(key)} is no headway/comparison/1: {first_fault(e)}.") from e
        files = ModelFiles.of_version(version)
        with own_errors():
            blocks = self.evaluate_files(self.spec, self.store, self.dataset, files, self.base).blocks
        if not all(math.isfinite(loss) for loss in blocks.losses):
            raise RunError(f"The losses of {version.name} on these samples are not finite numbers.")
        try:
            found = Compared(version=version.number, blocks=blocks)
            self.store.create_json(key, found.model_dump(mode="json"))
        except AlreadyExists:
            return Compared.model_validate(self.store.get_json(key)).blocks
        return blocks


def read_evaluation(store: Store, run_id: str) -> Evaluation | None:
    """
    Raises:
        IntegrityError: what stands there is no evaluation.
    """
    key = layout.evaluation(run_id)
    try:
        found = store.get_json(key)
        if isinstance(found, dict) and "format" not in found:  # of Headway before 0.2: the figures alone
            return Evaluation(figures=found, blocks=Blocks())
        return Evaluation.model_validate(found)
    except NotFound:
        return None
    except ValidationError as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a headway/evaluation/1 object: {first_fault(e)}.") from e


def version_to_beat(store: Store, release: ReleaseSpec, *, but_for: str) -> Version | None:
    """What the channel has in force, the entries of the run ``but_for`` itself and rejected versions left out."""
    entries = channels.history(store, release.model, release.channel).entries
    history = [each for each in entries if each.run_id != but_for]
    now = in_force(history, Verdicts.of(channels.readable_status(store, release.model, release.channel)))
    return None if now.version is None else read_version(store, release.model, now.version)


def why_not_comparable(spec: RunSpec, dataset: DatasetManifest, version: Version) -> str:
    """Why a version cannot be evaluated on the run's samples; empty where it can. Pure."""
    if version.task != spec.task:
        return f"its task is {version.task}, and this run's {spec.task}"
    if version.dataset.fingerprint == dataset.fingerprint:
        return ""
    if dataset.classes:
        return "its classes may be others"
    if not _same_tokenizer(version.files, dataset):
        return "it has another tokenizer"
    return ""


def _same_tokenizer(files: Mapping[str, Any], dataset: DatasetManifest) -> bool:
    tokenizer = files.get("tokenizer.json")
    return tokenizer is not None and tokenizer.sha256 == dataset.tokenizer.sha256
