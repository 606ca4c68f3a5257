"""The run file: YAML in, a frozen :class:`RunSpec` out. Pure but for :func:`load`, which reads one file.

Every component owns its part of the file and its limits. Unknown keys are errors, so that a misspelt
setting is never silently ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from orchestrator.errors import SpecError

API_VERSION = "headway/v1"
MAX_NAME = 31  # a run's id is the name, a dash and 8 digits, at most 40 characters

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=MAX_NAME)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, which pydantic would take for the number 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value has no meaning here")
        return value


class ModelSpec(_Part):
    """What is trained: an architecture from scratch, in the words of a transformers config."""

    architecture: dict[str, Any]
    """``model_type`` and any field of that transformers config. ``vocab_size`` follows the tokenizer unless set."""
    init_from: str | None = None
    """``RUN-ID@STEP``: a committed checkpoint of another run in the same store, whose weights to start from."""

    def init_from_checkpoint(self) -> tuple[str, int]:
        """``init_from`` as (run id, step)."""
        source, _, step = str(self.init_from).partition("@")
        return source, int(step)

    @field_validator("init_from")
    @classmethod
    def _names_a_checkpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9-]+-[0-9a-f]{8}@[0-9]+", value):
            raise ValueError("must be RUN-ID@STEP, such as demo-1a2b3c4d@400; see: headway list checkpoints RUN")
        return value

    @field_validator("architecture")
    @classmethod
    def _has_model_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs model_type, the name of a transformers architecture such as llama")
        try:
            canonical_json(value)
        except (TypeError, ValueError) as e:
            raise ValueError(f"holds what JSON cannot say: {e}") from e
        return value


class DataSpec(_Part):
    """Where the samples come from: a source to prepare, or a dataset prepared before."""

    train: Annotated[str, Field(min_length=1)] | None = None
    """A glob under ``s3://bucket/prefix`` or a local path; ``**`` crosses folders."""
    dataset: Annotated[str, Field(min_length=1)] | None = None
    """``NAME`` (its newest preparation) or ``NAME@FINGERPRINT``."""
    format: Literal["text", "jsonl", "parquet"] = "text"
    text_field: str = "text"
    """The field or column that holds the text, for jsonl and parquet."""
    vocab_size: Annotated[int, Field(ge=258, le=2**31)] = 4096
    """Size of the byte-level BPE trained on the source."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the source's files held out, chosen by a hash of each path."""
    sequence_length: PositiveInt = 256
    """Tokens that the model sees in one sample."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.train is None) == (self.dataset is None):
            raise ValueError("needs exactly one of train (a source to prepare) and dataset (prepared before)")
        return self


class OptimizerSpec(_Part):
    """AdamW and its learning rate over the steps."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3.0e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-8
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_learning_rate_ratio: Fraction = 0.1
    """Where linear and cosine end, as a share of ``learning_rate``."""


class ZeroSpec(_Part):
    """DeepSpeed ZeRO: what is partitioned over the workers (0 nothing, 1 optimizer, 2 gradients, 3 parameters)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload: Literal["none", "cpu"] = "none"

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> ZeroSpec:
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("offload: cpu needs stage 1, 2 or 3")
        return self


class TrainSpec(_Part):
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    global_batch_size: PositiveInt = 32
    """Samples per optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 8
    """The most samples that one worker computes at once."""
    optimizer: OptimizerSpec = OptimizerSpec()
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    zero: ZeroSpec = ZeroSpec()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto`` is bf16 where the device computes it natively, else fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    step_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds without progress after which a worker is hung, and the group of workers is restarted."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        return self


class CheckpointSpec(_Part):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 3
    """Newest checkpoints kept; those of released versions stay besides."""


class Workers(_Part):
    min: PositiveInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; set min at most max")
        return self


class ResourcesSpec(_Part):
    workers: Workers = Workers()
    gpu: str | None = None
    """Kind of GPU, or ``any``; null trains on CPUs. One worker is one rank and, with gpu, one GPU."""
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that the group of workers is restarted in one attempt."""


class ExportSpec(_Part):
    """How the last checkpoint becomes Hugging Face files."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto`` is the precision that the run was trained in."""
    max_shard_bytes: Annotated[int, Field(ge=2**20)] = 2 * 2**30
    """Tensors in one file; a larger tensor gets a file of its own."""


class GateSpec(_Part):
    max_loss: Annotated[float, Field(gt=0.0)] | None = None
    """Nats per token on the held-out split."""
    must_beat_serving: bool = False
    max_eval_samples: PositiveInt | None = None
    """Evaluate on the first so many samples of the held-out split; null takes all."""


class ReleaseSpec(_Part):
    model: Name
    channel: Name = "production"


class RunSpec(_Part):
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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise SpecError(
            f"There is no run file at {path}.", next_step="Name an existing file, or write one with: headway init"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"The run file {path} cannot be read: {e}.") from e
    try:
        document = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(e, "problem", None) or "it cannot be parsed"
        raise SpecError(f"{path} is not YAML{where}: {problem}.", next_step="Compare with: headway init") from e
    return parse(document, source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key stand twice and takes the last; a person who wrote it twice meant one of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(document: object, *, source: str = "run file") -> RunSpec:
    """Check a parsed document.

    Raises:
        SpecError: one line per fault: the field, its value, the limit.
    """
    if not isinstance(document, dict):
        raise SpecError(
            f"{source} holds {type(document).__name__}, not a mapping of fields.",
            next_step="Compare with: headway init",
        )
    if document.get("apiVersion") != API_VERSION:
        found = repr(document["apiVersion"]) if "apiVersion" in document else "missing"
        raise SpecError(
            f"{source}: apiVersion is {found}; this Headway reads {API_VERSION!r}.",
            next_step=f"Write apiVersion: {API_VERSION}",
        )
    try:
        return RunSpec.model_validate(document)
    except ValidationError as e:
        faults = [_fault(error) for error in e.errors(include_url=False)]
        if len(faults) == 1:
            message = f"{source}: {faults[0]}"
        else:
            message = "\n  ".join([f"{source} has {len(faults)} faults:", *faults])
        raise SpecError(message, next_step="All fields and limits: headway schema, docs/run-file.md") from e


_WORDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_long": "may have at most {max_length} characters",
    "string_pattern_mismatch": "may hold only a-z, 0-9 and dashes, and starts and ends with one of a-z and 0-9",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping of fields",
    "dict_type": "must be a mapping of fields",
    "tuple_type": "must be a list",
}
"""Limits in the words of a run file, by pydantic's type of error. The only pattern is that of a name."""


def _fault(error: Any) -> str:
    """One pydantic error as ``field: value is refused: limit``."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: no such field{_near(field)}."
    if error["type"] == "missing":
        return f"{field}: missing, and has no default."
    words = _WORDS.get(error["type"])
    message = words.format(**error.get("ctx", {})) if words else str(error["msg"]).removeprefix("Value error, ")
    if not field:  # a combination of fields, which its message names
        return f"{message}."
    value = error.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f" {json.dumps(value, default=str)[:80]} is refused:"
    return f"{field}:{shown} {message[:1].lower()}{message[1:]}."


def _near(field: str) -> str:
    """A hint at the field that was probably meant."""
    *parents, leaf = field.split(".")
    model: type[BaseModel] = RunSpec
    for parent in parents:
        annotation = model.model_fields[parent].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    close = difflib.get_close_matches(leaf, model.model_fields, n=1)
    return f"; did you mean {close[0]}" if close else f"; known here are {', '.join(model.model_fields)}"


def json_schema() -> dict[str, Any]:
    """The run file's JSON Schema (draft 2020-12), for editors and CI."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunSpec.model_json_schema()}


def run_id(spec: RunSpec, *, dataset_fingerprint: str, code_digest: str) -> str:
    """``<name>-<8 hex digits>`` of what changes the weights, and of nothing else.

    checkpoint, resources, export, gate, release, train.step_timeout and the target stay outside: editing them
    continues the same run.
    """
    changes_weights = {
        "task": spec.task,
        "model": spec.model.model_dump(mode="json", exclude=None if spec.model.init_from else {"init_from"}),
        "train": spec.train.model_dump(mode="json", exclude={"step_timeout"}),
        "dataset": dataset_fingerprint,
        "sequence_length": spec.data.sequence_length,
        "code": code_digest if spec.user_code else "",
    }
    return f"{spec.name}-{hashlib.sha256(canonical_json(changes_weights)).hexdigest()[:8]}"


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
