"""The parts of the run file that shape the weights, and so name the run: model, data, train."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.deepspeed_keys import check_keys
from orchestrator.document import Part
from orchestrator.spec.values import Fraction, Momentum, PositiveInt, require_json


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
        require_json(value)
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
    format: Literal["text", "source", "jsonl", "parquet", "messages"] = "text"
    """``source`` is text of a source tree, without what does not belong to it. ``messages`` is JSON lines or Parquet
    of conversations: ``messages``, or ``prompt`` and ``completion``."""
    text_field: str = "text"
    """The field or column that holds the text, for jsonl and parquet."""
    label_field: Annotated[str, Field(min_length=1)] | None = None
    """The field or column that holds the class of the text, for jsonl and parquet."""
    long_samples: Literal["truncate", "skip"] = "truncate"
    """What becomes of a conversation, or a labelled text, that is longer than ``sequence_length``."""
    vocab_size: Annotated[int, Field(ge=258, le=2**31)] = 4096
    """Size of the byte-level BPE trained on the source, where no tokenizer is given."""
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """A ``tokenizer.json``: a path, or ``s3://bucket/key``. None trains one, or takes the pretrained model's."""
    end_of_text: Annotated[str, Field(min_length=1)] | None = None
    """The token of ``tokenizer`` behind each document; None looks for one of the usual names."""
    clean: bool = True
    """Whether texts lose a byte order mark, carriage returns and control characters, and empty ones are left out."""
    max_bad_records: Fraction = 0.01
    """Share of the records, and of the files, that may be bad before preparing fails."""
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
        if self.tokenizer is not None and self.train is None:
            raise ValueError("takes tokenizer only beside train; a dataset prepared before has its own")
        if self.end_of_text is not None and self.tokenizer is None:
            raise ValueError("takes end_of_text only beside tokenizer, of which it names a token")
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
        require_json(value)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        return self
