"""The parts of the run file that leave the weights alone: how a run is carried out, and what becomes of its model."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from orchestrator.document import Part
from orchestrator.spec.values import EnvName, Finite, Metric, Name, PositiveInt


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


NoticeEvent = Literal["done", "refused", "failed", "rejected", "stalled"]
"""``rejected`` is the server's word on a version that was released; ``stalled`` is training that makes no step."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class NotifySpec(Part):
    """A webhook that is told how the run ends, and that it stands still."""

    webhook: Annotated[str, Field(min_length=1)] | None = None
    """Where notices are posted to: https, or http on the loopback."""
    webhook_env: EnvName | None = None
    """The variable that holds the webhook's address, where the address itself is a secret."""
    events: Annotated[tuple[NoticeEvent, ...], Field(min_length=1)] = (
        "done", "refused", "failed", "rejected", "stalled",
    )  # fmt: skip
    stalled_minutes: Annotated[float, Field(gt=0.0)] = 30.0
    """Minutes without a step, while training is to go on, after which the run counts as stalled."""

    @model_validator(mode="after")
    def _one_address(self) -> NotifySpec:
        if (self.webhook is None) == (self.webhook_env is None):
            raise ValueError("needs exactly one of webhook (an address) and webhook_env (the variable that holds one)")
        return self

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            check_webhook(value)
        return value


def check_webhook(url: str) -> None:
    """
    Raises:
        ValueError: nothing may be posted there.
    """
    parts = urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in LOOPBACK
    if not parts.hostname or not (parts.scheme == "https" or is_local):
        raise ValueError("must be an https:// address; http:// is for this machine's own loopback")
