"""The one adapter to DeepSpeed's optimizers: what a rank holds of an engine's state, as views that save and resume use.

DeepSpeed's public ``safe_*`` functions do not suffice: they know no ZeRO-0, need a first step before there is any
optimizer state, gather whole parameters, and leave the low-precision copies stale after a change. Which private
attributes are read instead stands in :mod:`orchestrator.checkpoint.optimizers`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.optimizers import Copies, Family, Partitions, Plain, Stage3, full_numel, full_shape
from orchestrator.errors import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")

LossScale = dict[str, float | int | bool]
"""Numbers by name, as JSON holds them."""

_LOSS_SCALER_FIELDS = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


@dataclass(frozen=True, kw_only=True)
class OwnedFragment:
    """A run of elements of one flattened parameter that this rank holds.

    ``tensors`` are 1-D views of ``length`` elements into the memory that trains: reading them snapshots it,
    writing them changes it. A trainable parameter has fp32, exp_avg and exp_avg_sq, all fp32; a frozen one has
    frozen, in the model's own dtype.
    """

    parameter: str
    start: int
    length: int
    tensors: dict[str, Tensor]


class ZeroState:
    """One engine's weights, moments and loss scale, wherever DeepSpeed keeps them.

    Raises:
        RunError: DeepSpeed's optimizer is of a class that is not known here, or not Adam with its state in fp32.
    """

    def __init__(self, engine: Any) -> None:
        # A tied parameter comes once, under its first name.
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._family = _family_of(engine.optimizer)
        self._base = self._family.base
        self._require_adam()
        self._require_all_trainable()
        self._family.prepare()
        self._create_moments()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trainable parameter, whatever this rank holds of it."""
        return {name: full_shape(p) for p, name in self._names.items() if p.requires_grad}

    @property
    def frozen_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and full shape of every frozen parameter, whatever this rank holds of it."""
        return {name: (p.dtype, full_shape(p)) for p, name in self._names.items() if not p.requires_grad}

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all masters and moments (ZeRO-0), so that a save divides the writing."""
        return self._family.is_replicated

    @property
    def frozen_is_replicated(self) -> bool:
        """Whether every rank holds all frozen parameters (all but ZeRO-3)."""
        return self._family.weights_are_whole

    def fragments(self) -> list[OwnedFragment]:
        """What this rank holds of the trainable parameters, in a fixed order."""
        return [
            OwnedFragment(
                parameter=self._names[place.parameter],
                start=place.start,
                length=place.length,
                tensors={
                    "fp32": place.cut(place.master),
                    **{kind: place.cut(self._base.state[place.master][kind]) for kind in MOMENTS},
                },
            )
            for place in self._family.places()
            if place.length > 0
        ]

    def frozen(self) -> list[OwnedFragment]:
        """What this rank holds of the parameters that do not train, in a fixed order."""
        parts = [(name, *self._family.weights(p)) for p, name in self._names.items() if not p.requires_grad]
        return [
            OwnedFragment(parameter=name, start=start, length=flat.numel(), tensors={"frozen": flat})
            for name, start, flat in parts
            if flat.numel() > 0
        ]

    @property
    def optimizer_step(self) -> int:
        """Adam's own count of steps, which its bias correction needs."""
        return max((int(self._base.state[master]["step"]) for master in self._family.masters()), default=0)

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for master in self._family.masters():
            state = self._base.state[master]
            if torch.is_tensor(state["step"]):
                state["step"].fill_(float(value))
            else:
                state["step"] = value
        for group in self._base.param_groups:
            if "step" in group:
                group["step"] = value

    @property
    def loss_scaler(self) -> LossScale | None:
        """Where dynamic loss scaling stands (fp16), None where there is none.

        Hysteresis is known at ZeRO-1, 2 and 3 only. Limits and windows are settings, not state.
        """
        scaler = self._family.scaler
        if scaler is None:
            return None
        return {
            name: kind(getattr(scaler, name)) for name, kind in _LOSS_SCALER_FIELDS.items() if hasattr(scaler, name)
        }

    @loss_scaler.setter
    def loss_scaler(self, value: LossScale | None) -> None:
        scaler = self._family.scaler
        if scaler is None or value is None:
            return
        for name, kind in _LOSS_SCALER_FIELDS.items():
            if name in value and hasattr(scaler, name):
                setattr(scaler, name, kind(value[name]))

    def refresh(self) -> None:
        """Bring the low-precision and gathered copies up to what was written. Collective: all ranks call it."""
        with torch.no_grad():
            self._family.refresh()

    def gather_kept(self) -> None:
        """Gather what ZeRO-3 means to keep gathered: to be called before each forward pass. Collective.

        DeepSpeed gathers it anew after each optimizer step alone, and lets go of it in the first pass that it records.
        A pass before the next step then finds a LoRA matrix gone that peft's layer looks at, takes it for that
        layer's own from there on, and fails in the backward pass, where its record says otherwise.
        """
        with torch.no_grad():
            self._family.gather_kept()

    def _require_adam(self) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if not isinstance(self._base, (torch.optim.Adam, FusedAdam, DeepSpeedCPUAdam)):
            raise RunError(f"Checkpoints hold Adam's state; {type(self._base).__name__} keeps another.")
        if any(group.get("amsgrad") for group in self._base.param_groups):
            raise RunError("Checkpoints do not hold amsgrad's third moment.", next_step="Set amsgrad to false.")
        if any(master.dtype != torch.float32 for master in self._family.masters()):
            raise RunError(
                "Checkpoints hold fp32 master weights; this engine keeps them in a lower precision.",
                next_step="Remove fp16_master_weights_and_grads or bf16_master_weights_and_grads from its config.",
            )

    def _require_all_trainable(self) -> None:
        known = set(chain(*self._family.groups))
        left_out = [name for p, name in self._names.items() if p.requires_grad and p not in known and full_numel(p) > 0]
        if left_out:
            raise RunError(
                f"{left_out[0]} is trainable, and not among the optimizer's parameters.",
                next_step="Give it to the optimizer, or freeze it with requires_grad_(False).",
            )

    def _create_moments(self) -> None:
        """Create Adam's state where it does not exist yet, as zeros and without a step.

        torch creates it inside the first ``step()``; a resume needs it before, and a made-up step would change
        weights and counters.
        """
        counts_in_tensors = isinstance(self._base, torch.optim.Adam)  # DeepSpeed's own optimizers count in ints
        for master in self._family.masters():
            state = self._base.state[master]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(master, requires_grad=False)
            if "step" not in state:
                state["step"] = torch.tensor(0.0) if counts_in_tensors else 0


def partition_unfilled(
    module: nn.Module, unfilled: Container[str], *, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Cut a model's parameters as ZeRO-3 does, before DeepSpeed would, and write no page that this rank does not own.

    DeepSpeed broadcasts each whole parameter first, so that a rank holds, for a while, all of the largest one.

    Args:
        unfilled: names of parameters whose memory nobody has touched, and which are filled later. All others have the
            same values on every rank.
        config: what DeepSpeed's engine is then made with.
        dtype: of the parameters that compute.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    # Without it the config is checked as if there were one rank. DeepSpeed's engine would call it later.
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=not torch.distributed.is_initialized())

    class Unfilled(Init):  # type: ignore[misc]  # DeepSpeed has no types
        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    for name, parameter in module.named_parameters():
        # Not a conversion: that would write the whole of it.
        parameter.data = torch.empty_like(parameter, dtype=dtype) if name in unfilled else parameter.data.to(dtype)
    Unfilled(module=module, config_dict_or_path=config, dtype=dtype)


def _family_of(optimizer: Any) -> Family:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Exact classes: what derives from them (SuperOffload, ZenFlow) keeps its state elsewhere.
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        if optimizer.swap_optimizer or (optimizer.offload_optimizer and optimizer.partial_offload < 1):
            raise RunError(
                "Checkpoints of optimizer state on NVMe, or offloaded in part, are not supported.",
                next_step="Set offload_optimizer to device cpu with ratio 1.",
            )
        return Stage3(optimizer)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return Partitions(optimizer, masters="single_partition_of_fp32_groups", groups="bit16_groups")
    if type(optimizer) is BF16_Optimizer:
        return Partitions(optimizer, masters="fp32_groups_flat_partition", groups="bf16_groups")
    if type(optimizer) in (FP16_Optimizer, FP16_UnfusedOptimizer):
        return Copies(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return Plain(optimizer)
    raise RunError(f"Checkpoints of DeepSpeed's {type(optimizer).__name__} are not supported.")
