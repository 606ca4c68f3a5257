"""What DeepSpeed is told, and which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.plan import split_batch
from orchestrator.spec import OptimizerSpec, TrainSpec, ZeroSpec
from workloads.deepspeed_config import deepspeed_config
from workloads.engine import parameter_groups


def config(*, world_size: int = 2, device: str = "cpu", precision: str = "fp32", **fields: Any) -> dict[str, Any]:
    train = TrainSpec(steps=10, global_batch_size=32, micro_batch_size=8, **fields)
    split = split_batch(32, world_size, 8)
    return deepspeed_config(
        train, split, precision=precision, device=torch.device(device), num_trainable=10**6  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 32])
def test_the_batch_sizes_agree_as_deepspeed_demands(world_size: int) -> None:
    found = config(world_size=world_size)
    micro, accumulation = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert found["train_batch_size"] == micro * accumulation * world_size >= 32
    assert micro <= 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_is_passed_on(stage: int) -> None:
    assert config(zero=ZeroSpec(stage=stage))["zero_optimization"]["stage"] == stage


def test_the_optimizer_is_adamw_as_the_run_file_says() -> None:
    optimizer = OptimizerSpec(learning_rate=2e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.05)
    found = config(optimizer=optimizer)["optimizer"]
    assert found["type"] == "AdamW"
    expected = {"lr": 2e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.05}
    assert found["params"] == {**expected, "torch_adam": True, "fused": True}
    assert config(optimizer=optimizer, device="cuda")["optimizer"]["params"] == expected


def test_clipping_and_precision_only_where_asked_for() -> None:
    assert config()["gradient_clipping"] == 1.0
    assert config(max_grad_norm=None)["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip to 1.0
    assert not {"bf16", "fp16"} & config().keys()
    assert config(precision="bf16")["bf16"] == {"enabled": True}
    assert config(precision="fp16")["fp16"] == {"enabled": True}


def test_offload_and_overlap() -> None:
    assert "offload_optimizer" not in config()["zero_optimization"]
    offloaded = config(zero=ZeroSpec(stage=2, offload="cpu"), device="cuda")["zero_optimization"]
    assert offloaded["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert offloaded["overlap_comm"]
    assert not config()["zero_optimization"]["overlap_comm"]


def test_parameters_are_gathered_ahead_on_gpus_alone() -> None:
    assert config(zero=ZeroSpec(stage=3))["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
    assert config(zero=ZeroSpec(stage=3), device="cuda")["zero_optimization"]["stage3_prefetch_bucket_size"] == 10**6


def test_the_run_files_own_settings_lie_over_these() -> None:
    own = {"communication_data_type": "fp32", "zero_optimization": {"stage3_prefetch_bucket_size": 7}}
    found = config(zero=ZeroSpec(stage=3), deepspeed=own)
    assert found["communication_data_type"] == "fp32"
    assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert found["zero_optimization"]["stage"] == 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.linear.weight = self.embedding.weight


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Model()
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]  # tied weights stand once
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (model.scale, model.linear.bias, model.norm.weight, model.norm.bias)
    }


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim >= 2)
    (decayed,) = parameter_groups(model, weight_decay=0.1)
    assert len(decayed["params"]) == 1
