"""What one worker needs in memory, in bytes. Pure arithmetic over the size of a model.

Notation: P parameters, T of them trainable, N workers, d bytes of a number in the training precision (fp32 4, else 2);
b rows of a micro-batch, s tokens a row, h hidden size, i size of the MLP between its layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from orchestrator.spec import ZeroSpec

Precision = Literal["fp32", "bf16", "fp16"]
Place = Literal["device", "host"]

PROCESS_BYTES = 920 * 10**6
"""Resident memory of a worker before it holds a parameter: Python with ray.train, torch, deepspeed and transformers'
Llama imported. Measured on Linux with torch 2.15, deepspeed 0.19.8, transformers 5.24, ray 2.60: 918 MB."""
COLLECTIVES_BYTES = 66 * 2**20
"""One rank's buffers of DeepSpeed's shared-memory all-reduce between CPU workers (csrc/cpu/comm/shm.cpp)."""
DEVICE_CONTEXT_BYTES = 600 * 10**6
"""CUDA context, kernels and cuBLAS workspaces. Assumed, not measured."""
OVERHEAD = 0.15
"""Share added for the allocator. Measured: see :func:`estimate_memory`."""
MAX_BUCKET_ELEMENTS = 50_000_000
MAX_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters
STATE_BYTES = 12  # of a trainable parameter in fp32: master weight and Adam's two moments


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSize(_Frozen):
    """What the estimate needs of a model. None means that the architecture does not say."""

    num_parameters: NonNegativeInt
    num_trainable: NonNegativeInt
    largest_parameter: NonNegativeInt
    """Elements of the largest parameter tensor."""
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    vocab_size: PositiveInt | None = None


class MemoryPart(_Frozen):
    label: str
    place: Place
    num_bytes: NonNegativeInt


class MemoryEstimate(_Frozen):
    """One worker's memory at its peak. On CPUs everything is on the host."""

    parts: tuple[MemoryPart, ...]
    device_limit_bytes: int | None
    """What one GPU has. None where there is no GPU, or where it is unknown."""
    host_limit_bytes: int | None
    """One worker's share of the host's memory. None where it is unknown."""
    not_counted: tuple[str, ...] = ()
    """What the architecture does not say enough about. Then the true need is above the sum."""

    @property
    def device_bytes(self) -> int:
        return self._sum("device")

    @property
    def host_bytes(self) -> int:
        return self._sum("host")

    @property
    def fits(self) -> bool | None:
        """Whether a worker fits; None where a limit that counts is unknown, or a part could not be counted."""
        pairs = [(self.host_bytes, self.host_limit_bytes)]
        if self.device_bytes:
            pairs.append((self.device_bytes, self.device_limit_bytes))
        if any(limit is not None and need > limit for need, limit in pairs):
            return False
        return None if self.not_counted or any(limit is None for _, limit in pairs) else True

    def _sum(self, place: Place) -> int:
        return sum(part.num_bytes for part in self.parts if part.place == place)


def bucket_elements(num_trainable: int) -> int:
    """DeepSpeed's ``reduce_bucket_size`` and ``allgather_bucket_size``: its default of 5e8 would be 2 GB in fp32.

    Even, because stages 1 and 2 refuse an odd one (stage_1_and_2.py).
    """
    return min(MAX_BUCKET_ELEMENTS, max(2, num_trainable + num_trainable % 2))


def estimate_memory(
    *,
    size: ModelSize,
    zero: ZeroSpec,
    precision: Precision,
    world_size: int,
    micro_rows: int,
    sequence_length: int,
    gpu: bool,
    activation_checkpointing: bool = False,
    deepspeed: Mapping[str, Any] = MappingProxyType({}),
    device_limit_bytes: int | None = None,
    host_limit_bytes: int | None = None,
) -> MemoryEstimate:
    """The parts of one worker's peak.

    - parameters d·P, gradients d·T, optimizer 12·T (fp32 master, two moments): 16 bytes a parameter in mixed
      precision. Stage 1 divides the optimizer's by N, stage 2 the gradients too, stage 3 the parameters too
      (Rajbhandari et al. 2020, "ZeRO", sec. 3 and 5). In fp32 stage 0 has no master (4 + 4 + 8); the other stages
      keep one although it equals the weights, because DeepSpeed clones it (stage_1_and_2.py).
    - stage 3 gathers parameters to compute: at most ``MAX_LIVE_ELEMENTS`` of them, and at least the largest.
    - one bucket of gradients on its way to the other ranks: d·min(T, ``MAX_BUCKET_ELEMENTS``). Two at stages 1
      and 2 on GPUs, where the next is filled meanwhile (stage_1_and_2.py).
    - train.deepspeed may set the sizes of both.
    - offload cpu moves the optimizer's share to the host, beside a fp32 copy of the gradients' share.
    - activations, per layer: 34·s·b·h bytes at d = 2 (Korthikanti et al. 2022, "Reducing Activation Recomputation",
      eq. 1), without its attention scores, 5·a·s²·b, because transformers computes attention with SDPA, which does
      not keep them. 34·h is (8·d + 2)·h of attention, norms and masks plus 2·d·i of an MLP with i = 4·h. Here the
      MLP counts 4·d·i, as a gated one (SwiGLU) saves twice that, and the norms 8·h more, as transformers computes
      them in fp32. Measured for Llama by saved-tensor hooks: 2 to 5 % less than this.
    - with activation checkpointing, per layer only its input, d·s·b·h, and all of the one layer that is computed again.
    - adapters keep the inputs of the layers that they adapt, as those layers themselves would, so the sum is the same.
    - logits: b·s·V·(d + 4 + 4), in the model's precision, in fp32 for the loss, and their gradient.
    - the optimizer's step, which comes after the activations are gone: its fp32 gradients, 4·T/N. It is a fused one,
      without temporaries. Only what exceeds activations and logits is added.
    - the checkpoint's host buffers: 12 bytes per parameter that the rank owns.
    - ``OVERHEAD`` on the sum, mostly for holes in the heap. Measured, estimate over peak resident memory in fp32, 2 CPU
      workers: of a 21 M-parameter Llama at stages 0, 1, 2, 3 without checkpoints 1.07, 1.01, 1.01, 0.95; of a full
      fine-tune of SmolLM2-135M at stage 3 with checkpoints 0.97, with activation checkpointing 0.85, with LoRA 0.90 and
      0.79 (tests/bench/plan_memory.py). Adapters leave more holes, as their outputs come and go.
    """
    number_bytes = 4 if precision == "fp32" else 2
    place: Place = "device" if gpu else "host"
    parts = _states(size, zero, number_bytes, world_size, place)
    parts += _passing(size, zero, number_bytes, place, deepspeed.get("zero_optimization", {}))
    computing, not_counted = _activations(
        size, number_bytes, micro_rows * sequence_length, place, checkpointing=activation_checkpointing
    )
    parts += computing
    step_bytes = 0 if zero.offload == "cpu" else 4 * _share(size.num_trainable, world_size, zero.stage >= 1)
    above = step_bytes - sum(part.num_bytes for part in computing)
    parts.append(MemoryPart(label="optimizer step, above activations", place=place, num_bytes=max(0, above)))
    snapshot_bytes = STATE_BYTES * _share(size.num_trainable, world_size, zero.stage >= 1)
    parts.append(MemoryPart(label="checkpoint snapshot", place="host", num_bytes=snapshot_bytes))
    parts.append(MemoryPart(label="process", place="host", num_bytes=PROCESS_BYTES))
    if gpu:
        parts.append(MemoryPart(label="CUDA context", place="device", num_bytes=DEVICE_CONTEXT_BYTES))
    elif world_size > 1:
        parts.append(MemoryPart(label="collectives", place="host", num_bytes=COLLECTIVES_BYTES))
    for where in ("device", "host") if gpu else ("host",):
        total = sum(part.num_bytes for part in parts if part.place == where)
        parts.append(MemoryPart(label="allocator", place=where, num_bytes=int(OVERHEAD * total)))
    return MemoryEstimate(
        parts=tuple(part for part in parts if part.num_bytes),
        device_limit_bytes=device_limit_bytes if gpu else None,
        host_limit_bytes=host_limit_bytes,
        not_counted=not_counted,
    )


def _share(num_elements: int, world_size: int, is_partitioned: bool) -> int:
    """Elements that one rank holds, rounded up."""
    return -(-num_elements // world_size) if is_partitioned else num_elements


def _states(size: ModelSize, zero: ZeroSpec, number_bytes: int, world_size: int, place: Place) -> list[MemoryPart]:
    trainable, owned = size.num_trainable, _share(size.num_trainable, world_size, zero.stage >= 1)
    optimizer_bytes = 8 if zero.stage == 0 and number_bytes == 4 else STATE_BYTES
    optimizer_place: Place = "host" if zero.offload == "cpu" else place
    counts: list[tuple[str, Place, int]] = [
        ("parameters", place, number_bytes * _share(size.num_parameters, world_size, zero.stage == 3)),
        ("gradients", place, number_bytes * _share(trainable, world_size, zero.stage >= 2)),
        ("optimizer state", optimizer_place, optimizer_bytes * owned),
        ("offloaded gradients", "host", 4 * owned if zero.offload == "cpu" else 0),
    ]
    return [MemoryPart(label=label, place=where, num_bytes=num_bytes) for label, where, num_bytes in counts]


def _passing(
    size: ModelSize, zero: ZeroSpec, number_bytes: int, place: Place, settings: Mapping[str, Any]
) -> list[MemoryPart]:
    """What ZeRO holds for a while in every step.

    Args:
        settings: the run file's own of DeepSpeed's ``zero_optimization``.
    """
    live = _number(settings, "stage3_max_live_parameters", MAX_LIVE_ELEMENTS)
    gathered = min(size.num_parameters, max(live, size.largest_parameter)) if zero.stage == 3 else 0
    bucket = _number(settings, "reduce_bucket_size", bucket_elements(size.num_trainable)) if size.num_trainable else 0
    num_buckets = 2 if zero.stage in (1, 2) and settings.get("overlap_comm", place == "device") else 1
    return [
        MemoryPart(label="gathered parameters", place=place, num_bytes=number_bytes * gathered),
        MemoryPart(label="gradient bucket", place=place, num_bytes=number_bytes * bucket * num_buckets),
    ]


def _number(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name)
    return int(value) if isinstance(value, int | float) and value >= 0 else default


def _activations(
    size: ModelSize, number_bytes: int, tokens: int, place: Place, *, checkpointing: bool
) -> tuple[list[MemoryPart], tuple[str, ...]]:
    parts: list[MemoryPart] = []
    not_counted: list[str] = []
    if size.hidden_size is None or size.num_layers is None:
        not_counted.append("activations")
    else:
        inner = size.intermediate_size or 4 * size.hidden_size
        per_token = size.hidden_size * (8 * number_bytes + 10) + 4 * inner * number_bytes
        kept = size.num_layers * (number_bytes * size.hidden_size if checkpointing else per_token)
        again = per_token if checkpointing else 0
        parts.append(MemoryPart(label="activations", place=place, num_bytes=tokens * (kept + again)))
    if size.vocab_size is not None:
        num_bytes = tokens * size.vocab_size * (number_bytes + 8)
        parts.append(MemoryPart(label="logits", place=place, num_bytes=num_bytes))
    return parts, tuple(not_counted)
