"""What an attempt will do on the cluster that it finds. Pure: parts of the run file and a capacity in, a plan out."""

from __future__ import annotations

import fractions
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from orchestrator.errors import EnvironmentUnusable, SpecError
from orchestrator.memory import MemoryEstimate, MemoryPart, ModelSize, Precision, bucket_elements, estimate_memory
from orchestrator.spec import ResourcesSpec, TrainSpec, ZeroSpec

__all__ = [
    "BatchSplit",
    "Capacity",
    "MemoryEstimate",
    "MemoryPart",
    "ModelSize",
    "Plan",
    "Precision",
    "bucket_elements",
    "estimate_memory",
    "human_bytes",
    "num_steps",
    "plan",
    "resolve_precision",
    "split_batch",
    "world_size",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Capacity(_Frozen):
    """What a target has for workers."""

    num_cpus: float
    num_gpus: float = 0.0
    host_memory_bytes: int | None = None
    """Memory of all machines together, which the workers share evenly. None where it is unknown."""
    device_memory_bytes: int | None = None
    """Memory of one GPU. None where it is unknown."""
    native_bf16: bool = False
    """Whether the device that trains computes bf16 in hardware."""


class BatchSplit(_Frozen):
    """Which rank computes which rows of a global batch, and in how many micro-batches.

    Every rank runs ``accumulation`` micro-batches; number k holds rows ``[k·micro_rows, (k+1)·micro_rows)`` of its own.
    What its own do not fill is padded with zero-weight rows. So all ranks compute tensors of one shape and take
    part in the same number of collectives. The loss is normalised by the global count of tokens, not of rows.
    """

    global_batch_size: PositiveInt
    world_size: PositiveInt
    accumulation: PositiveInt
    micro_rows: PositiveInt

    def rows_of(self, rank: int) -> range:
        """Rows of the global batch that ``rank`` computes: contiguous, and one more on the first ranks.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}")
        rows, extra = divmod(self.global_batch_size, self.world_size)
        first = rank * rows + min(rank, extra)
        return range(first, first + rows + (rank < extra))

    @property
    def num_padding_rows(self) -> int:
        """Zero-weight rows of one step, over all ranks."""
        return self.world_size * self.accumulation * self.micro_rows - self.global_batch_size


class Plan(_Frozen):
    """One attempt's plan; JSON with its version in ``format``."""

    format: Literal["headway/plan/1"] = "headway/plan/1"
    batch: BatchSplit
    sequence_length: int
    gpu: str | None
    cpus_per_worker: int
    zero: ZeroSpec
    precision: Precision
    activation_checkpointing: bool = False
    deepspeed: dict[str, Any] = {}
    """The run file's own settings of DeepSpeed."""
    num_steps: int | None
    """None while it follows from a count of samples that only ``prepare`` brings."""
    size: ModelSize | None
    memory: MemoryEstimate | None
    memory_note: str = ""
    """Why ``memory`` is None."""

    @property
    def num_workers(self) -> int:
        return self.batch.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, sums and verdict of the memory included."""
        document: dict[str, Any] = json.loads(self.model_dump_json())
        document["tokens_per_step"] = self.tokens_per_step
        if self.memory is not None:
            sums = {"device_bytes": self.memory.device_bytes, "host_bytes": self.memory.host_bytes}
            document["memory"] |= {**sums, "fits": self.memory.fits}
        return document

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values with units, for people."""
        batch, device = self.batch, f"1 GPU ({self.gpu})" if self.gpu else "no GPU"
        padding = f", and {_count(batch.num_padding_rows, 'row')} of padding" if batch.num_padding_rows else ""
        steps = "unknown until the data is prepared" if self.num_steps is None else f"{self.num_steps:,}"
        offload = "" if self.zero.offload == "none" else f", optimizer offloaded to {self.zero.offload}"
        rows = [
            ("workers", f"{self.num_workers}, each {_count(self.cpus_per_worker, 'CPU')} and {device}"),
            ("steps", steps),
            (
                "global batch",
                f"{_count(batch.global_batch_size, 'row')} of {self.sequence_length:,} tokens "
                f"= {self.tokens_per_step:,} tokens a step{padding}",
            ),
            ("per worker", f"{batch.accumulation} × {_count(batch.micro_rows, 'row')}"),
            ("ZeRO", f"stage {self.zero.stage}{offload}"),
            ("precision", self.precision),
        ]
        if self.activation_checkpointing:
            rows.append(("activations", "computed again in the backward pass"))
        if self.deepspeed:
            rows.append(("DeepSpeed", ", ".join(_settings(self.deepspeed))))
        if self.size is not None:
            rows.append(("parameters", _parameters(self.size)))
        if self.memory is None:
            return [*rows, ("memory per worker", f"unknown: {self.memory_note}")]
        return rows + _memory_lines(self.memory)


def plan(
    *,
    train: TrainSpec,
    resources: ResourcesSpec,
    sequence_length: int,
    capacity: Capacity,
    size: ModelSize | None,
    size_note: str = "",
    num_samples: int | None = None,
) -> Plan:
    """Plan an attempt.

    Args:
        size: the model's; None leaves the memory unknown, for the reason in ``size_note``.
        num_samples: of the training split; None before the data is prepared.

    Raises:
        EnvironmentUnusable: the capacity does not hold ``workers.min`` workers.
        SpecError: the device lacks the precision, or the data is too short for one step.
    """
    gpu = resources.gpu is not None
    num_workers = world_size(resources, capacity)
    precision = resolve_precision(train.precision, gpu=gpu, native_bf16=capacity.native_bf16)
    batch = split_batch(train.global_batch_size, num_workers, train.micro_batch_size)
    host_bytes = capacity.host_memory_bytes
    memory = None
    if size is not None:
        memory = estimate_memory(
            size=size,
            zero=train.zero,
            precision=precision,
            world_size=num_workers,
            micro_rows=batch.micro_rows,
            sequence_length=sequence_length,
            gpu=gpu,
            activation_checkpointing=train.activation_checkpointing,
            deepspeed=train.deepspeed,
            device_limit_bytes=capacity.device_memory_bytes,
            host_limit_bytes=None if host_bytes is None else host_bytes // num_workers,
        )
    return Plan(
        batch=batch,
        sequence_length=sequence_length,
        gpu=resources.gpu,
        cpus_per_worker=resources.cpus_per_worker,
        zero=train.zero,
        precision=precision,
        activation_checkpointing=train.activation_checkpointing,
        deepspeed=train.deepspeed,
        num_steps=num_steps(train, num_samples, sequence_length=sequence_length),
        size=size,
        memory=memory,
        memory_note="" if memory else size_note or "the model's size is not known",
    )


def world_size(resources: ResourcesSpec, capacity: Capacity) -> int:
    """The most workers in ``workers.min..max`` that the capacity holds.

    Raises:
        EnvironmentUnusable: not even ``workers.min`` fit; names what is short.
    """
    workers, cpus = resources.workers, resources.cpus_per_worker
    short = []
    if capacity.num_cpus < workers.min * cpus:
        needed = f"{workers.min * cpus} CPUs (resources.cpus_per_worker {cpus} each)"
        short.append(f"{needed} and the target has {capacity.num_cpus:g}")
    if resources.gpu is not None and capacity.num_gpus < workers.min:
        short.append(f"{workers.min} GPUs (resources.gpu {resources.gpu!r}) and the target has {capacity.num_gpus:g}")
    if short:
        raise EnvironmentUnusable(
            f"resources.workers.min {workers.min} needs {'; '.join(short)}.",
            next_step="Lower resources.workers.min or cpus_per_worker, or use a larger target.",
        )
    fitting = int(capacity.num_cpus // cpus)
    if resources.gpu is not None:
        fitting = min(fitting, int(capacity.num_gpus))
    return min(workers.max, fitting)


def split_batch(global_batch_size: int, world_size: int, micro_batch_size: int) -> BatchSplit:
    """Split a global batch evenly over ranks, and a rank's rows evenly over as few micro-batches as the limit allows.

    Args:
        micro_batch_size: the most rows of a micro-batch.

    Raises:
        SpecError: there are more workers than rows.
    """
    if world_size > global_batch_size:
        raise SpecError(
            f"train.global_batch_size {global_batch_size} is below the {world_size} workers; each needs a row a step.",
            next_step="Raise train.global_batch_size, or lower resources.workers.max.",
        )
    rows = -(-global_batch_size // world_size)
    accumulation = -(-rows // micro_batch_size)
    return BatchSplit(
        global_batch_size=global_batch_size,
        world_size=world_size,
        accumulation=accumulation,
        micro_rows=-(-rows // accumulation),
    )


def num_steps(train: TrainSpec, num_samples: int | None, *, sequence_length: int) -> int | None:
    """``train.steps``, or the full global batches in ``train.epochs`` passes over ``num_samples``; None without them.

    Raises:
        SpecError: no step comes out of it, or the warm-up is not shorter than the training.
    """
    if num_samples == 0:
        raise SpecError(
            f"data.sequence_length {sequence_length} is longer than the whole training split, which holds no sample.",
            next_step="Lower data.sequence_length, or give data.train more files.",
        )
    if train.epochs is None or num_samples is None:
        return train.steps
    # Through the decimal that was written: 0.29 × 100 is 28.999999999999996 in floating point.
    steps = int(fractions.Fraction(str(train.epochs)) * num_samples) // train.global_batch_size
    if steps == 0:
        raise SpecError(
            f"train.epochs {train.epochs:g} over {num_samples} samples are less than one global batch of "
            f"{train.global_batch_size}.",
            next_step="Raise train.epochs, lower train.global_batch_size, or give train.steps.",
        )
    if train.optimizer.warmup_steps >= steps:
        raise SpecError(
            f"train.optimizer.warmup_steps {train.optimizer.warmup_steps} must be below the {steps} steps that "
            f"train.epochs {train.epochs:g} makes of {num_samples} samples.",
            next_step="Lower warmup_steps, or raise epochs.",
        )
    return steps


def resolve_precision(asked: Literal["auto", "fp32", "bf16", "fp16"], *, gpu: bool, native_bf16: bool) -> Precision:
    """The precision to train in; ``auto`` is bf16 where the device computes it natively, else fp32.

    Raises:
        SpecError: the device lacks what was asked for.
    """
    if asked == "auto":
        return "bf16" if native_bf16 else "fp32"
    device = "GPU" if gpu else "CPU"
    if asked == "bf16" and not native_bf16:
        raise SpecError(
            f"train.precision bf16 is refused: the target's {device} does not compute it natively, "
            "which makes it many times slower than fp32.",
            next_step="Set train.precision to auto or fp32.",
        )
    if asked == "fp16" and not gpu:
        raise SpecError(
            "train.precision fp16 is refused: it needs a GPU.", next_step="Set train.precision to auto or fp32."
        )
    return asked


def human_bytes(num_bytes: int) -> str:
    """``1.5 GiB``: three digits at most, powers of 1,024."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _memory_lines(memory: MemoryEstimate) -> list[tuple[str, str]]:
    verdict = {True: "fits", False: "does not fit", None: "unknown whether it fits"}[memory.fits]
    rows = []
    for place, need, limit in (
        ("device", memory.device_bytes, memory.device_limit_bytes),
        ("host", memory.host_bytes, memory.host_limit_bytes),
    ):
        if need:
            of = f" of {human_bytes(limit)}" if limit is not None else ""
            rows.append((f"{place} memory per worker", f"{human_bytes(need)}{of}"))
            rows += [(f"  {part.label}", human_bytes(part.num_bytes)) for part in memory.parts if part.place == place]
    missing = f" (not counted: {', '.join(memory.not_counted)})" if memory.not_counted else ""
    return [*rows, ("memory", verdict + missing)]


def _parameters(size: ModelSize) -> str:
    trained = f", of which {size.num_trainable:,} are trained" if size.num_trainable < size.num_parameters else ""
    return f"{size.num_parameters:,}{trained}"


def _settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``name value`` of each, with a dotted name where it lies deeper."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {json.dumps(value)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
