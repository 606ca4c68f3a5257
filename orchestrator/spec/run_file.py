"""The run file: YAML in, a frozen :class:`RunSpec` out. Pure but for :func:`load`, which reads one file.

Every component owns its part of the file and its limits. Unknown keys are errors, so that a misspelt
setting is never silently ignored.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.document import SECRET_NAME, Part, check, read_yaml
from orchestrator.spec.operation import (
    CheckpointSpec,
    ExportSpec,
    GateSpec,
    NotifySpec,
    ReleaseSpec,
    ResourcesSpec,
)
from orchestrator.spec.training import DataSpec, ModelSpec, TrainSpec
from orchestrator.spec.values import EnvName, Name, canonical_json

_STARTER = "headway init"


class RunSpec(Part):
    """A whole run file. See docs/run-file.md for every field with its default and limits."""

    apiVersion: Literal["headway/v1"]  # noqa: N815  the file's own spelling
    name: Name
    task: str = "causal-lm"
    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    resources: ResourcesSpec = ResourcesSpec()
    export: ExportSpec = ExportSpec()
    gate: GateSpec = GateSpec()
    release: ReleaseSpec | None = None
    notify: NotifySpec | None = None
    env: dict[EnvName, str] = Field(default={})
    """Variables of every process of the run."""
    secrets: tuple[Annotated[str, Field(pattern=SECRET_NAME, max_length=253)], ...] = ()
    """Names of Kubernetes Secrets whose keys become variables too; never their values."""

    @field_validator("env")
    @classmethod
    def _env_is_not_ours(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name.startswith(("HEADWAY_", "AWS_", "RAY_AUTH_")):
                raise ValueError(f"may not hold {name}, which the target sets; credentials go by secrets")
        return value

    @field_validator("task")
    @classmethod
    def _task_form(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9-]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError("must be a built-in task's name or module:Class in the working directory")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> RunSpec:
        train, workers = self.train, self.resources.workers
        if workers.max > train.global_batch_size:
            raise ValueError(
                f"resources.workers.max {workers.max} is above train.global_batch_size {train.global_batch_size}; "
                "every worker needs at least one sample a step"
            )
        if train.precision == "fp16" and self.resources.gpu is None:
            raise ValueError("train.precision fp16 needs a GPU; set resources.gpu, or precision fp32")
        if train.zero.offload == "cpu" and self.resources.gpu is None:
            raise ValueError("train.zero.offload cpu needs a GPU to offload from; set resources.gpu, or offload none")
        if train.steps is not None and train.optimizer.warmup_steps >= train.steps:
            raise ValueError(
                f"train.optimizer.warmup_steps {train.optimizer.warmup_steps} must be below train.steps {train.steps}"
            )
        if self.gate.must_beat_serving and self.release is None:
            raise ValueError("gate.must_beat_serving needs release.model, whose serving version is to be beaten")
        if self.data.tokenizer is not None and self.model.pretrained is not None:
            raise ValueError("data.tokenizer excludes model.pretrained, whose own tokenizer is what its weights know")
        return self

    def sha256(self) -> str:
        """Digest of the whole file as understood, defaults included."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def user_code(self) -> bool:
        """Whether the task comes from the submitted working directory, whose code then shapes the weights."""
        return ":" in self.task


def load(path: Path) -> RunSpec:
    """Read and check a run file.

    Raises:
        SpecError: the file is missing, not YAML, or says something that is not allowed.
    """
    return parse(read_yaml(path, what="run file", compare=_STARTER), source=str(path))


def parse(document: object, *, source: str = "run file") -> RunSpec:
    """Check a parsed document.

    Raises:
        SpecError: one line per fault: the field, its value, the limit.
    """
    return check(RunSpec, document, source=source, compare=_STARTER, all_fields="headway schema, docs/run-file.md")


def json_schema() -> dict[str, Any]:
    """The run file's JSON Schema (draft 2020-12), for editors and CI."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunSpec.model_json_schema()}


def run_id(
    spec: RunSpec, *, dataset_fingerprint: str, code_digest: str, base_fingerprint: str = "", edition: int = 0
) -> str:
    """``<name>-<8 hex digits>`` of what changes the weights, and of nothing else.

    checkpoint, resources, export, gate, release, notify, env, secrets, train.step_timeout and the target stay outside:
    editing them continues the same run. A pretrained model counts by its contents, not by where it lies. Settings that
    came later count where they are made, so that runs from before keep their ids.

    Args:
        edition: from 1 on, the same done anew, as a run of its own (store/editions.py).
    """
    train = spec.train
    later = {
        "activation_checkpointing": train.activation_checkpointing,
        "evaluate": train.evaluate is not None,
        "deepspeed": bool(train.deepspeed),
    }
    changes_weights = {
        "task": spec.task,
        "model": _model_identity(spec.model, base_fingerprint),
        "train": train.model_dump(
            mode="json", exclude={"step_timeout", *(field for field, is_set in later.items() if not is_set)}
        ),
        "dataset": dataset_fingerprint,
        "sequence_length": spec.data.sequence_length,
        "code": code_digest if spec.user_code else "",
        **({"edition": edition} if edition else {}),
    }
    return f"{spec.name}-{hashlib.sha256(canonical_json(changes_weights)).hexdigest()[:8]}"


def _model_identity(model: ModelSpec, base_fingerprint: str) -> dict[str, Any]:
    given: dict[str, Any] = model.model_dump(
        mode="json", exclude={"pretrained", "trust_remote_code"}, exclude_none=True
    )
    return {**given, "base": base_fingerprint} if model.pretrained is not None else given
