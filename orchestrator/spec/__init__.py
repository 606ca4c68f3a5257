"""The run file, as frozen models. What a person may write is in docs/run-file.md."""

from orchestrator.spec.operation import (
    CheckpointSpec,
    ExportSpec,
    GateSpec,
    NoticeEvent,
    NotifySpec,
    ReleaseSpec,
    ResourcesSpec,
    Workers,
    check_webhook,
)
from orchestrator.spec.run_file import RunSpec, json_schema, load, parse, run_id
from orchestrator.spec.training import (
    DataSpec,
    EvaluateSpec,
    LoraSpec,
    ModelSpec,
    OptimizerSpec,
    SampleKind,
    TrainSpec,
    ZeroSpec,
)
from orchestrator.spec.values import MAX_NAME, EnvName, PositiveInt, canonical_json

__all__ = [
    "MAX_NAME",
    "CheckpointSpec",
    "DataSpec",
    "EnvName",
    "EvaluateSpec",
    "ExportSpec",
    "GateSpec",
    "LoraSpec",
    "ModelSpec",
    "NoticeEvent",
    "NotifySpec",
    "OptimizerSpec",
    "PositiveInt",
    "ReleaseSpec",
    "ResourcesSpec",
    "RunSpec",
    "SampleKind",
    "TrainSpec",
    "Workers",
    "ZeroSpec",
    "canonical_json",
    "check_webhook",
    "json_schema",
    "load",
    "parse",
    "run_id",
]
