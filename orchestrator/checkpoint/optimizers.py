"""Where each class of DeepSpeed optimizer keeps the fp32 masters, and the weights that compute.

All attributes of DeepSpeed that are no public API of its own are used here, and ``Init``'s in
:func:`orchestrator.checkpoint.zero.partition_unfilled`; the tests pin them to the tested version.

===============================  ============================  =====================================================
class                            used at                       attributes used
===============================  ============================  =====================================================
torch.optim.Optimizer            ZeRO-0, fp32                  state, param_groups
FP16_Optimizer                   ZeRO-0, bf16 and fp16, where  fp16_groups, fp32_groups_flat, optimizer,
                                 Adam is FusedAdam (GPU)       loss_scale_config
FP16_UnfusedOptimizer            ZeRO-0, bf16 and fp16, with   fp16_groups, fp32_groups, optimizer,
                                 any other Adam                loss_scale_config
DeepSpeedZeroOptimizer           ZeRO-1 and 2                  single_partition_of_fp32_groups, bit16_groups,
                                                               optimizer, loss_scaler, update_lp_params
BF16_Optimizer                   ZeRO-1, bf16, gradients       fp32_groups_flat_partition, bf16_groups, optimizer,
                                 accumulated in fp32, no       update_lp_params
                                 offload
DeepSpeedZeroOptimizer_Stage3    ZeRO-3                        fp16_groups, fp32_partitioned_groups_flat, optimizer,
                                                               grad_position, get_param_id, loss_scaler,
                                                               swap_optimizer, partial_offload,
                                                               _partition_all_parameters,
                                                               _reassign_or_swap_out_partitioned_parameters,
                                                               persistent_parameters
LossScaleConfig                  ZeRO-0, fp16                  dynamic_loss_scale; cur_scale, cur_iter,
                                                               last_overflow_iter
DynamicLossScaler                ZeRO-1, 2 and 3, fp16         dynamic; the same, and cur_hysteresis
a parameter                      ZeRO-1 and 2                  _hp_mapping
a parameter                      ZeRO-3                        ds_shape, ds_numel, ds_tensor, partition
Init                             ZeRO-3, pretrained weights    _zero_init_param, _convert_to_deepspeed_param
===============================  ============================  =====================================================

With ``offload_optimizer`` on the CPU, masters and moments are ordinary tensors in host memory: views reach them
without a copy to the GPU.

Tested with deepspeed 0.19.8.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """``length`` elements of a parameter, from ``start`` of it, at ``offset`` of the master that Adam steps."""

    parameter: torch.nn.Parameter
    master: Tensor
    offset: int
    start: int
    length: int

    def cut(self, tensor: Tensor) -> Tensor:
        """This place in a tensor that is laid out as the master."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


class Family(ABC):
    """One kind of optimizer. Constructed by :class:`orchestrator.checkpoint.zero.ZeroState` alone."""

    is_replicated = False
    """Whether each rank holds all masters."""

    weights_are_whole = True
    """Whether each rank holds all of every parameter."""

    def __init__(self, optimizer: Any, groups: list[list[torch.nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.groups = groups
        """The parameters that train, by the optimizer's groups."""

    @property
    def base(self) -> Any:
        """The optimizer with Adam's state, which DeepSpeed wraps."""
        return self.optimizer.optimizer

    @property
    def scaler(self) -> Any:
        """What holds the dynamic loss scale; None where there is none."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None

    def prepare(self) -> None:  # noqa: B027  most have nothing to mend
        """Mend what DeepSpeed did to the state on construction."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The tensors that Adam steps."""

    @abstractmethod
    def places(self) -> Iterator[Place]:
        """Every parameter's part in this rank's masters."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the masters to the weights that compute."""

    def gather_kept(self) -> None:  # noqa: B027  most keep all whole
        """Gather the weights that every rank is to hold whole between forward passes, where it does not."""

    def weights(self, parameter: torch.nn.Parameter) -> tuple[int, Tensor]:
        """This rank's part of the weights that compute: where it starts in the parameter, and a flat view."""
        return 0, parameter.detach().view(-1)


class Plain(Family):
    """No ZeRO, fp32: the parameters are the masters."""

    is_replicated = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, [[p for p in g["params"] if p.requires_grad] for g in optimizer.param_groups])

    @property
    def base(self) -> Any:
        return self.optimizer

    def masters(self) -> list[Tensor]:
        return list(chain(*self.groups))

    def places(self) -> Iterator[Place]:
        for parameter in chain(*self.groups):
            yield Place(parameter, parameter, 0, 0, parameter.numel())

    def refresh(self) -> None:
        pass


class Copies(Family):
    """No ZeRO, bf16 or fp16: each rank holds a whole fp32 copy, as one tensor a group (fused) or a parameter."""

    is_replicated = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, optimizer.fp16_groups)
        self._held: list[tuple[Tensor, list[torch.nn.Parameter]]]
        if hasattr(optimizer, "fp32_groups_flat"):
            self._held = list(zip(optimizer.fp32_groups_flat, self.groups, strict=True))
        else:
            copies = chain(*optimizer.fp32_groups)
            self._held = [(copy, [p]) for copy, p in zip(copies, chain(*self.groups), strict=True)]

    @property
    def scaler(self) -> Any:
        config = self.optimizer.loss_scale_config
        return config if config.dynamic_loss_scale else None

    def prepare(self) -> None:
        """Take back the step with zero gradients by which DeepSpeed creates Adam's state: it decays the masters
        and is counted, so that training would differ from that at the other stages."""
        states = [self.base.state[master] for master in self.masters()]
        if any(int(state["step"]) != 1 or state["exp_avg_sq"].any() for state in states):
            return  # taken back before, or it has trained
        for place in self.places():
            place.cut(place.master).copy_(place.parameter.detach().view(-1))
        for state in states:
            state["step"] *= 0

    def masters(self) -> list[Tensor]:
        return [master for master, _ in self._held]

    def places(self) -> Iterator[Place]:
        for master, group in self._held:
            offset = 0
            for parameter in group:
                yield Place(parameter, master, offset, 0, parameter.numel())
                offset += parameter.numel()

    def refresh(self) -> None:
        for place in self.places():
            place.parameter.view(-1).copy_(place.cut(place.master))


class Partitions(Family):
    """ZeRO-1 and 2: each group is one flat tensor, cut evenly among the ranks."""

    def __init__(self, optimizer: Any, *, masters: str, groups: str) -> None:
        super().__init__(optimizer, getattr(optimizer, groups))
        self._masters = getattr(optimizer, masters)

    def masters(self) -> list[Tensor]:
        return list(self._masters)

    def places(self) -> Iterator[Place]:
        for master, group in zip(self._masters, self.groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    in_master, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                    start, length = int(in_parameter.start), int(in_master.numel)
                    yield Place(parameter, master, int(in_master.start), start, length)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Stage3(Family):
    """ZeRO-3: each parameter is cut evenly among the ranks, the last part padded."""

    weights_are_whole = False

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, optimizer.fp16_groups)

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def places(self) -> Iterator[Place]:
        for parameter in chain(*self.groups):
            index, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start, weights = self.weights(parameter)
            master = self.optimizer.fp32_partitioned_groups_flat[index]
            yield Place(parameter, master, int(offset), start, weights.numel())

    def weights(self, parameter: Any) -> tuple[int, Tensor]:
        part = parameter.ds_tensor.detach().view(-1)
        start = min(torch.distributed.get_rank() * part.numel(), parameter.ds_numel)
        return start, part.narrow(0, 0, min(part.numel(), parameter.ds_numel - start))

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(self.groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.gather_kept()

    def gather_kept(self) -> None:
        small = self.optimizer.persistent_parameters  # frozen ones too
        if len(small) > 0:
            small[0].all_gather(small)


def full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Any) -> int:
    return math.prod(full_shape(parameter))
