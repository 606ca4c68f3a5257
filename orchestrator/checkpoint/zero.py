"""The one adapter to DeepSpeed's optimizers: where the fp32 masters and moments of each parameter lie.

DeepSpeed's public ``safe_*`` functions do not suffice: they know no ZeRO-0, need a first step before there is any
optimizer state, gather whole parameters, and leave the low-precision copies stale after a change. So this module
reads private attributes; the table below names all of them, and the tests pin them to the tested version.

===================================  ==================================================================
class                                attributes used
===================================  ==================================================================
DeepSpeedZeroOptimizer_Stage3        grad_position, get_param_id, fp32_partitioned_groups_flat, optimizer,
                                     fp16_groups, _partition_all_parameters,
                                     _reassign_or_swap_out_partitioned_parameters, persistent_parameters
DeepSpeedZeroOptimizer (1 and 2)     single_partition_of_fp32_groups, bit16_groups, optimizer,
                                     update_lp_params; of a parameter: _hp_mapping
BF16_Optimizer                       fp32_groups_flat_partition, bf16_groups, optimizer, update_lp_params;
                                     of a parameter: _hp_mapping
torch.optim.Optimizer (ZeRO-0, fp32) state, param_groups
===================================  ==================================================================

Tested with deepspeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OwnedFragment:
    """A run of elements of one flattened parameter whose state this rank holds.

    ``tensors`` maps fp32, exp_avg and exp_avg_sq to 1-D fp32 views of ``length`` elements into the optimizer's
    own memory: reading them snapshots it, writing them changes it.
    """

    parameter: str
    start: int
    length: int
    tensors: dict[str, Tensor]


class ZeroState:
    """One engine's master weights and moments, as fragments."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._kind = _kind_of(engine.optimizer)
        self._create_moments()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trainable parameter, whatever this rank holds of it."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for parameter, name in self._names.items()
            if parameter.requires_grad
        }

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds everything (ZeRO-0), so that a save divides the writing."""
        return self._kind == "torch"

    def fragments(self) -> list[OwnedFragment]:
        """What this rank holds, in a fixed order."""
        return [
            OwnedFragment(
                parameter=name,
                start=start,
                length=length,
                tensors={
                    "fp32": flat.detach().view(-1).narrow(0, offset, length),
                    **{k: self._moment(flat, k).view(-1).narrow(0, offset, length) for k in MOMENTS},
                },
            )
            for name, flat, offset, start, length in self._locate()
            if length > 0
        ]

    @property
    def optimizer_step(self) -> int:
        """Adam's own count of steps, which its bias correction needs."""
        return max((int(self._base.state[flat]["step"]) for flat in self._flat_tensors()), default=0)

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for flat in self._flat_tensors():
            state = self._base.state[flat]
            if torch.is_tensor(state["step"]):
                state["step"].fill_(float(value))
            else:
                state["step"] = value
        for group in self._base.param_groups:
            if "step" in group:
                group["step"] = value

    def refresh(self) -> None:
        """Bring the low-precision and gathered copies up to the masters. Collective: all ranks call it."""
        optimizer = self._engine.optimizer
        if self._kind == "stage3":
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if len(optimizer.persistent_parameters) > 0:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._kind in ("stage12", "bf16"):
            optimizer.update_lp_params()

    # -- where things are

    @property
    def _base(self) -> Any:
        """The torch optimizer that DeepSpeed wraps."""
        return self._engine.optimizer if self._kind == "torch" else self._engine.optimizer.optimizer

    def _flat_tensors(self) -> list[Tensor]:
        """The tensors that the wrapped optimizer steps, whose state is Adam's."""
        optimizer = self._engine.optimizer
        if self._kind == "stage3":
            return list(optimizer.fp32_partitioned_groups_flat)
        if self._kind == "stage12":
            return list(optimizer.single_partition_of_fp32_groups)
        if self._kind == "bf16":
            return list(optimizer.fp32_groups_flat_partition)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _locate(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """(parameter, flat tensor, offset in it, start in the flattened parameter, length)."""
        optimizer = self._engine.optimizer
        if self._kind == "torch":
            for flat in self._flat_tensors():
                yield self._names[flat], flat, 0, 0, flat.numel()
        elif self._kind == "stage3":
            rank = torch.distributed.get_rank()
            for group in optimizer.fp16_groups:
                for parameter in group:
                    index, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    flat, start = optimizer.fp32_partitioned_groups_flat[index], rank * int(size)
                    length = max(0, min(int(size), parameter.ds_numel - start))
                    yield self._names[parameter], flat, int(offset), start, length
        else:
            groups = optimizer.bit16_groups if self._kind == "stage12" else optimizer.bf16_groups
            for flat, group in zip(self._flat_tensors(), groups, strict=True):
                for parameter in group:
                    mapping = parameter._hp_mapping
                    if mapping is not None:
                        hp, lp = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                        yield self._names[parameter], flat, int(hp.start), int(lp.start), int(hp.numel)

    def _moment(self, flat: Tensor, kind: str) -> Tensor:
        moment: Tensor = self._base.state[flat][kind]
        return moment

    def _create_moments(self) -> None:
        """Create Adam's state where it does not exist yet, as zeros and without a step.

        torch creates it inside the first ``step()``; a resume needs it before, and a made-up step would change
        weights and counters.
        """
        counts_in_tensors = isinstance(self._base, torch.optim.Adam)  # DeepSpeed's own optimizers count in ints
        for flat in self._flat_tensors():
            state = self._base.state[flat]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat, requires_grad=False)
            if "step" not in state:
                state["step"] = torch.tensor(0.0) if counts_in_tensors else 0


def _kind_of(optimizer: Any) -> str:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for kind, cls in (
        ("stage3", DeepSpeedZeroOptimizer_Stage3),
        ("stage12", DeepSpeedZeroOptimizer),
        ("bf16", BF16_Optimizer),
        ("torch", torch.optim.Optimizer),
    ):
        if isinstance(optimizer, cls):
            return kind
    raise RunError(
        f"Checkpoints of DeepSpeed's {type(optimizer).__name__} are not supported.",
        next_step="Set train.zero.stage to 1, 2 or 3, or train.precision to fp32 or bf16.",
    )
