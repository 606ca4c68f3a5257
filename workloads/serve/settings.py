"""The arguments of the Serve application."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.release.canary_policy import CanaryPolicy
from workloads.serve.admission import EngineSettings
from workloads.serve.vllm_settings import VllmSettings


class ServeSettings(BaseModel):
    """One model's channel, and how it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    channel: str = "production"
    headway: str | None = None
    """The version of Headway that asks; another than this one's is refused. Null asks for none."""
    store: str | None = None
    """``s3://bucket/prefix``; null takes HEADWAY_STORE on the replica's node. Credentials come from AWS_…"""
    poll_s: Annotated[float, Field(gt=0.0)] = 2.0
    """Between two looks at the channel."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    min_replicas: Annotated[int, Field(ge=1)] | None = None
    """Where Serve adds and takes away replicas with the load: the fewest; null takes ``num_replicas``."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """The most; null keeps ``num_replicas``."""
    num_cpus: Annotated[float, Field(ge=0.0)] = 0.1
    """What a replica reserves in Ray. Little, so that on a small machine training still finds its CPUs."""
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    max_batch: Annotated[int, Field(ge=1)] = EngineSettings.max_batch
    """Sequences decoded at once."""
    max_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Sequences of the batch times the longest one's prompt and completion; null derives it from the free memory."""
    default_max_tokens: Annotated[int, Field(ge=1)] = EngineSettings.default_max_tokens
    """The longest answer of a chat whose request sets no limit."""
    max_queued: Annotated[int, Field(ge=0)] = EngineSettings.max_queued
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Of one replica's tensor operations; null takes half of the cores."""
    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Limit of all loaded versions together, by the size of their weights and a quarter; null takes what is free."""
    max_warm_up_s: Annotated[float, Field(gt=0.0)] = 60.0
    """A version whose first 16 tokens take longer is rejected."""
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0
    """The longest that a request may take, waiting included."""
    canary: CanaryPolicy = CanaryPolicy()
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. vLLM runs in applications of its own, one for each version, and only on GPUs."""
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _replicas(self) -> ServeSettings:
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError("min_replicas needs max_replicas beside it")
        if self.max_replicas is not None and self.max_replicas < (self.min_replicas or self.num_replicas):
            raise ValueError(f"max_replicas is {self.max_replicas}, below the fewest")
        return self

    def replicas(self) -> dict[str, Any]:
        """How many, as options of Serve's deployment."""
        fewest = self.min_replicas or self.num_replicas
        if self.max_replicas is None or self.max_replicas == fewest:
            return {"num_replicas": fewest}
        return {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": self.max_replicas,
                "initial_replicas": min(max(fewest, self.num_replicas), self.max_replicas),
                "target_ongoing_requests": self.max_batch,
            }
        }

    def engine_settings(self) -> EngineSettings:
        chosen = {} if self.num_threads is None else {"num_threads": self.num_threads}
        return EngineSettings(
            max_batch=self.max_batch,
            max_batch_tokens=self.max_batch_tokens,
            default_max_tokens=self.default_max_tokens,
            max_queued=self.max_queued,
            **chosen,
        )
