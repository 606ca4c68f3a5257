"""The run file: YAML in, a frozen :class:`RunSpec` out. Pure but for :func:`load`, which reads one file.

Every component owns its part of the file and its limits. Unknown keys are errors, so that a misspelt
setting is never silently ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.deepspeed_keys import check_keys
from orchestrator.document import ENV_NAME, NAME, SECRET_NAME, Part, check, read_yaml

_STARTER = "headway init"
MAX_NAME = 31  # a run's id is the name, a dash and 8 digits, at most 40 characters

Name = Annotated[str, Field(pattern=NAME, max_length=MAX_NAME)]
EnvName = Annotated[str, Field(pattern=ENV_NAME)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Metric = Annotated[str, Field(min_length=1)]


class LoraSpec(Part):
    """Low-rank adapters beside the frozen weights of a pretrained model (Hu et al. 2021), through peft."""

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The adapter's output is scaled by ``alpha / rank``."""
    dropout: Momentum = 0.0
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] | Literal["all-linear"] = "all-linear"
    """Last parts of module names, such as ``q_proj``; ``all-linear`` is every linear layer but the output."""


class ModelSpec(Part):
    """What is trained: an architecture from scratch, in the words of a transformers config, or a pretrained model."""

    architecture: dict[str, Any] | None = None
    """``model_type`` and any field of that transformers config. ``vocab_size`` follows the tokenizer unless set."""
    pretrained: Annotated[str, Field(min_length=1)] | None = None
    """A Hugging Face directory or a GGUF file: a path, ``s3://bucket/prefix``, or ``hf://org/name@<commit>``."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside the pretrained weights may run."""
    lora: LoraSpec | None = None
    init_from: str | None = None
    """``RUN-ID@STEP``: a committed checkpoint of another run in the same store, whose weights to start from."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if (self.architecture is None) == (self.pretrained is None):
            raise ValueError("needs exactly one of architecture (from scratch) and pretrained (weights to start from)")
        if self.pretrained is not None and self.init_from is not None:
            raise ValueError("takes pretrained or init_from, not both: each says which weights to start from")
        if self.lora is not None and self.pretrained is None:
            raise ValueError("takes lora only beside pretrained, whose weights the adapter leaves as they are")
        if self.trust_remote_code and self.pretrained is None:
            raise ValueError("takes trust_remote_code only beside pretrained")
        return self

    @field_validator("pretrained")
    @classmethod
    def _pins_a_commit(cls, value: str | None) -> str | None:
        if (
            value is not None
            and value.startswith("hf://")
            and not re.fullmatch(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}", value)
        ):
            raise ValueError("must be hf://org/name@<commit>, with all 40 digits of the commit; a branch may move")
        return value

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
    def _has_model_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs model_type, the name of a transformers architecture such as llama")
        _require_json(value)
        return value


SampleKind = Literal["stream", "packed", "labelled"]
"""``stream``: text cut into equal pieces. ``packed``: whole conversations, several to a row, of which only the
assistant's tokens are targets. ``labelled``: one text a row, and its class."""


class DataSpec(Part):
    """Where the samples come from: a source to prepare, or a dataset prepared before."""

    train: Annotated[str, Field(min_length=1)] | None = None
    """A glob under ``s3://bucket/prefix`` or a local path; ``**`` crosses folders."""
    dataset: Annotated[str, Field(min_length=1)] | None = None
    """``NAME`` (its newest preparation) or ``NAME@FINGERPRINT``."""
    format: Literal["text", "jsonl", "parquet", "messages"] = "text"
    """``messages`` is JSON lines or Parquet of conversations: ``messages``, or ``prompt`` and ``completion``."""
    text_field: str = "text"
    """The field or column that holds the text, for jsonl and parquet."""
    label_field: Annotated[str, Field(min_length=1)] | None = None
    """The field or column that holds the class of the text, for jsonl and parquet."""
    long_samples: Literal["truncate", "skip"] = "truncate"
    """What becomes of a conversation, or a labelled text, that is longer than ``sequence_length``."""
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
        if self.label_field is not None and self.format not in ("jsonl", "parquet"):
            raise ValueError(f"label_field {self.label_field!r} needs format jsonl or parquet, not {self.format}")
        return self

    @property
    def kind(self) -> SampleKind:
        """What the samples of this data are; see :data:`SampleKind`."""
        if self.format == "messages":
            return "packed"
        return "stream" if self.label_field is None else "labelled"


class OptimizerSpec(Part):
    """AdamW and its learning rate over the steps."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3.0e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-8
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_learning_rate_ratio: Fraction = 0.1
    """Where linear and cosine end, as a share of ``learning_rate``."""


class ZeroSpec(Part):
    """DeepSpeed ZeRO: what is partitioned over the workers (0 nothing, 1 optimizer, 2 gradients, 3 parameters)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload: Literal["none", "cpu"] = "none"

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> ZeroSpec:
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("offload: cpu needs stage 1, 2 or 3")
        return self


class EvaluateSpec(Part):
    """The held-out split, looked at while training goes on."""

    every_steps: PositiveInt
    max_samples: PositiveInt | None = 256
    """Looks at the first so many samples of the split; null takes all."""
    patience: PositiveInt | None = None
    """Training ends early once so many looks in a row did not better the best loss; null never ends it."""
    min_improvement: Annotated[float, Field(ge=0.0)] = 0.0
    """Nats per target by which a look has to better the best one, to count as better."""


class TrainSpec(Part):
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
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    evaluate: EvaluateSpec | None = None
    """Evaluation while training goes on; null evaluates the exported model alone."""
    deepspeed: dict[str, Any] = Field(default={})
    """Merged into DeepSpeed's config, but for what Headway sets itself."""
    step_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds without progress after which a worker is hung, and the group of workers is restarted."""

    @field_validator("deepspeed")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_keys(value)
        _require_json(value)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        return self


class CheckpointSpec(Part):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 3
    """Newest checkpoints kept; those of released versions stay besides."""


class Workers(Part):
    min: PositiveInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; set min at most max")
        return self


class ResourcesSpec(Part):
    workers: Workers = Workers()
    gpu: str | None = None
    """Kind of GPU, or ``any``; null trains on CPUs. One worker is one rank and, with gpu, one GPU."""
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that the group of workers is restarted in one attempt."""
    pip: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Python packages installed beside the cluster's own before the job starts, in pip's notation."""


class ExportSpec(Part):
    """How the last checkpoint becomes Hugging Face files."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto`` is the precision that the run was trained in."""
    max_shard_bytes: Annotated[int, Field(ge=2**20)] = 2 * 2**30
    """Tensors in one file; a larger tensor gets a file of its own."""
    lora: Literal["merged", "adapter"] = "merged"
    """``merged`` writes the whole model, ``adapter`` peft's files alone, which refer to the pretrained model."""


class GateSpec(Part):
    max_loss: Annotated[float, Field(gt=0.0)] | None = None
    """Nats per target on the held-out split."""
    min: dict[Metric, Finite] = Field(default={})
    """The least that figures of the evaluation may be, by name, such as ``accuracy``."""
    max: dict[Metric, Finite] = Field(default={})
    """The most that they may be."""
    must_beat_serving: bool = False
    max_eval_samples: PositiveInt | None = None
    """Evaluate on the first so many samples of the held-out split; null takes all."""


class ReleaseSpec(Part):
    model: Name
    channel: Name = "production"
    canary: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The share of requests that the new version answers until it has proved itself; null has it answer all at once."""


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


def run_id(spec: RunSpec, *, dataset_fingerprint: str, code_digest: str, base_fingerprint: str = "") -> str:
    """``<name>-<8 hex digits>`` of what changes the weights, and of nothing else.

    checkpoint, resources, export, gate, release, env, secrets, train.step_timeout and the target stay outside: editing
    them continues the same run. A pretrained model counts by its contents, not by where it lies. Settings that came
    later count where they are made, so that runs from before keep their ids.
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
    }
    return f"{spec.name}-{hashlib.sha256(canonical_json(changes_weights)).hexdigest()[:8]}"


def _model_identity(model: ModelSpec, base_fingerprint: str) -> dict[str, Any]:
    given: dict[str, Any] = model.model_dump(
        mode="json", exclude={"pretrained", "trust_remote_code"}, exclude_none=True
    )
    return {**given, "base": base_fingerprint} if model.pretrained is not None else given


def _require_json(value: Any) -> None:
    try:
        canonical_json(value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"holds what JSON cannot say: {e}") from e


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
