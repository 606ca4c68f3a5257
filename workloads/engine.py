"""The only caller of DeepSpeed's engine: one optimizer step, and the state to save."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.zero import ZeroState, partition_unfilled
from orchestrator.errors import RunError
from orchestrator.memory import Precision
from orchestrator.plan import BatchSplit
from orchestrator.spec import TrainSpec
from workloads.deepspeed_config import deepspeed_config

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model under ZeRO. All ranks make the same calls in the same order.

    Args:
        unfilled: parameters of the model that hold nothing yet, as :func:`workloads.pretrained_model.build` leaves
            them: at ZeRO-3 no rank then ever holds a whole one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train: TrainSpec,
        split: BatchSplit,
        precision: Precision,
        device: torch.device,
        unfilled: Collection[str] = (),
    ) -> None:
        import deepspeed

        require_dimensions(model)
        _use_own_ninja()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device, self.precision = device, precision
        self._split = split
        config = deepspeed_config(train, split, precision=precision, device=device, num_trainable=_num_trainable(model))
        groups = parameter_groups(model, weight_decay=train.optimizer.weight_decay)  # by shapes, so before partitioning
        if unfilled and train.zero.stage == 3:
            partition_unfilled(model, unfilled, config=config, dtype=_DTYPES[precision])
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=config,
            dist_init_required=not torch.distributed.is_initialized(),
        )
        _give_freed_memory_back()
        self.state = ZeroState(self._engine)
        self._engine.register_forward_pre_hook(lambda *_: self.state.gather_kept())

    @property
    def module(self) -> nn.Module:
        """The model that computes; call it for the loss."""
        return self._engine  # type: ignore[no-any-return]

    @property
    def model(self) -> nn.Module:
        """The model without DeepSpeed's wrapper, for its names and buffers."""
        return self._engine.module  # type: ignore[no-any-return]

    def backward(self, loss_sum: Tensor, *, global_targets: int) -> None:
        """Accumulate one micro-batch's gradients of (sum of losses over all ranks) / global_targets.

        DeepSpeed divides by the number of micro-batches and averages over ranks; both are undone here, so that
        the gradient does not depend on how the batch was split.
        """
        undo = self._split.accumulation * self._split.world_size
        self._engine.backward(loss_sum * (undo * self._missing_loss_scale() / global_targets))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Apply the accumulated gradients. Returns the global gradient norm before clipping, NaN if it has none."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        plain = self._plain_norm()
        self._engine.step()
        norm = plain if plain is not None else self._engine.get_global_grad_norm()
        if norm is None or (self._engine.fp16_enabled() and self._engine.optimizer.overflow):
            return 0.0  # fp16 skipped this step and lowers its loss scale
        return float(norm) if norm >= 0 else math.nan  # DeepSpeed says -1 for a norm that is not finite

    def _plain_norm(self) -> float | None:
        """The norm without ZeRO, where every rank holds the whole reduced gradient.

        DeepSpeed keeps none in fp32, and keeps one that is still multiplied by the loss scale in fp16.
        """
        if not self.state.is_replicated:
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        return float(torch.nn.utils.get_total_norm(norms)) / self._missing_loss_scale()

    def _missing_loss_scale(self) -> float:
        """What DeepSpeed divides fp16's gradients by without having multiplied the loss by it: so does 0.19.8
        without ZeRO, and gradients would vanish."""
        if self.precision == "fp16" and self.state.is_replicated:
            return float(self._engine.optimizer.loss_scale)
        return 1.0


def require_dimensions(model: nn.Module) -> None:
    """DeepSpeed broadcasts parameters as bytes, which torch refuses for those without a dimension.

    Raises:
        RunError: the model has one.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise RunError(
                f"DeepSpeed takes no parameter of shape (), and {name} is one.", next_step="Give it the shape (1,)."
            )


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on vectors (norms and biases)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _give_freed_memory_back() -> None:
    """Hand the memory that building took to the system before Adam's moments take theirs. glibc only.

    ZeRO-3 moves its partitions into one buffer: of 135 M parameters on two ranks, each kept 270 MB freed but resident.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def build_cpu_op() -> None:
    """Compile DeepSpeed's CPU communication op, about half a minute, so that workers find it built."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    _use_own_ninja()
    ShareMemCommBuilder().load(verbose=False)


def _use_own_ninja() -> None:
    """Put this environment's programs first on PATH: two versions of ninja rebuild each other's work, every time."""
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if not path.startswith(own):
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"
