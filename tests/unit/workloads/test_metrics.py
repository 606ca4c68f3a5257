"""What events say to the metrics."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.record.peak import peak_flops, utilization
from workloads.metrics import _COUNTERS, _GAUGES, readings

GROUP = {"world_size": 4, "load_s": 2.5, "device": "NVIDIA A100-SXM4-80GB", "flops_per_token": 6e9}
STEP = {
    "step": 7, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 7000, "tokens_per_s": 104_000.0,
    "step_s": 3.0, "data_wait_s": 1.0, "save_s": 0.25,
}  # fmt: skip


def said(kind: str, fields: dict[str, Any], group: dict[str, Any] | None = None) -> dict[str, float]:
    """By the metric's name, and its part where it has one."""
    found = list(readings(kind, fields, group=group or {}, now_s=50.0))
    assert {each.name for each in found} <= _GAUGES.keys() | _COUNTERS.keys()
    assert all(bool(each.part) == (each.name == "headway_train_seconds_total") for each in found)
    return {each.part or each.name.removeprefix("headway_"): each.value for each in found}


def test_a_step() -> None:
    assert said("step", STEP, GROUP) == {
        **{f"train_{name}": value for name, value in STEP.items() if name != "tokens"},
        "train_last_step_time_s": 50.0,
        "train_mfu": pytest.approx(0.5),
        "computing": 2.0,
        "waiting for data": 1.0,
        "saving": 0.25,
    }


def test_a_first_batch_that_took_longer_than_its_step_is_no_negative_time() -> None:
    assert said("step", {**STEP, "data_wait_s": 5.0})["computing"] == 0.0


def test_no_mfu_without_a_peak() -> None:
    assert "train_mfu" not in said("step", STEP, {**GROUP, "device": "cpu"})
    assert "train_mfu" not in said("step", STEP, {**GROUP, "flops_per_token": None})


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("training", GROUP, {"train_world_size": 4, "resuming": 2.5}),
        ("look", {"eval_loss": 3.0, "seconds": 4.0}, {"train_eval_loss": 3.0, "evaluating": 4.0}),
        ("look", {"eval_loss": None, "seconds": 4.0}, {"evaluating": 4.0}),
        (
            "checkpoint",
            {"step": 8, "seconds": 1.5},
            {"checkpoints_total": 1, "checkpoint_step": 8, "checkpoint_time_s": 50.0, "checkpoint_seconds": 1.5},
        ),
        ("checkpoint_failed", {"step": 8, "seconds": 9.0}, {"checkpoint_failures_total": 1, "checkpoint_seconds": 9.0}),
        ("training_done", {"step": 9, "save_s": 0.5}, {"saving": 0.5}),
        ("preemption", {"nodes": []}, {}),
    ],
)
def test_other_events(kind: str, fields: dict[str, Any], expected: dict[str, float]) -> None:
    assert said(kind, fields) == expected


# -- peaks


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("Tesla T4", 65),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 990),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_by_the_names_that_torch_gives(device: str, tera: float | None) -> None:
    assert peak_flops(device) == (None if tera is None else tera * 1e12)


def test_utilization_is_over_all_devices() -> None:
    found = utilization(tokens_per_s=1e6, flops_per_token=6e9, device="NVIDIA H100 80GB HBM3", num_devices=8)
    assert found == pytest.approx(6e15 / (8 * 989.5e12))
