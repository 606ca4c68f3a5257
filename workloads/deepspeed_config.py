"""DeepSpeed's config for a run. Pure: it imports no DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.deepspeed_keys import merged
from orchestrator.memory import MAX_LIVE_ELEMENTS, Precision, bucket_elements
from orchestrator.plan import BatchSplit
from orchestrator.spec import OptimizerSpec, TrainSpec


def deepspeed_config(
    train: TrainSpec, split: BatchSplit, *, precision: Precision, device: torch.device, num_trainable: int
) -> dict[str, Any]:
    """What Headway sets, with ``train.deepspeed`` laid over it, whose keys the run file has checked."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": split.micro_rows,
        "gradient_accumulation_steps": split.accumulation,
        "train_batch_size": split.micro_rows * split.accumulation * split.world_size,
        "optimizer": _optimizer(train.optimizer, device),
        "zero_optimization": _zero(train, device, num_trainable),
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if train.max_grad_norm is not None:
        config["gradient_clipping"] = train.max_grad_norm
    if precision in ("bf16", "fp16"):
        config[precision] = {"enabled": True}
    return merged(config, train.deepspeed)


def _optimizer(optimizer: OptimizerSpec, device: torch.device) -> dict[str, Any]:
    return {
        "type": "AdamW",
        "params": {
            "lr": optimizer.learning_rate,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            **({"torch_adam": True} if device.type == "cpu" else {}),
        },
    }


def _zero(train: TrainSpec, device: torch.device, num_trainable: int) -> dict[str, Any]:
    bucket = bucket_elements(num_trainable)
    zero: dict[str, Any] = {
        "stage": train.zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": MAX_LIVE_ELEMENTS,
        "overlap_comm": device.type == "cuda",
    }
    if train.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return zero
