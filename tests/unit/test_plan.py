"""Planning: workers, batch split, steps, precision, memory, and how a plan reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import EnvironmentUnusable, SpecError
from orchestrator.memory import PROCESS_BYTES
from orchestrator.plan import (
    Capacity,
    MemoryEstimate,
    ModelSize,
    Plan,
    bucket_elements,
    estimate_memory,
    human_bytes,
    num_steps,
    plan,
    resolve_precision,
    split_batch,
    world_size,
)
from orchestrator.spec import ResourcesSpec, TrainSpec, ZeroSpec

MILLION = 10**6
SIZE = ModelSize(
    num_parameters=8 * MILLION,
    num_trainable=8 * MILLION,
    largest_parameter=MILLION,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=4,
    num_attention_heads=4,
    vocab_size=4096,
)


def _resources(least: int = 1, most: int = 4, **fields: Any) -> ResourcesSpec:
    return ResourcesSpec.model_validate({"workers": {"min": least, "max": most}, **fields})


def _train(**fields: Any) -> TrainSpec:
    return TrainSpec.model_validate({"steps": 200, **fields} if "epochs" not in fields else fields)


def _estimate(size: ModelSize = SIZE, **fields: Any) -> MemoryEstimate:
    zero = ZeroSpec(stage=fields.pop("stage", 2), offload=fields.pop("offload", "none"))
    given_fields = {
        "precision": "bf16",
        "world_size": 4,
        "micro_rows": 2,
        "sequence_length": 128,
        "gpu": True,
        **fields,
    }
    return estimate_memory(size=size, zero=zero, **given_fields)


def _parts(estimate: MemoryEstimate, place: str) -> dict[str, int]:
    return {part.label: part.num_bytes for part in estimate.parts if part.place == place}


# --- world size


@pytest.mark.parametrize(
    ("resources", "capacity", "expected"),
    [
        (_resources(1, 4), Capacity(num_cpus=16), 4),
        (_resources(1, 4), Capacity(num_cpus=3.5), 3),
        (_resources(2, 4, cpus_per_worker=2), Capacity(num_cpus=5), 2),
        (_resources(1, 8, gpu="any"), Capacity(num_cpus=64, num_gpus=3), 3),
        (_resources(1, 8, gpu="any", cpus_per_worker=8), Capacity(num_cpus=16, num_gpus=8), 2),
    ],
)
def test_world_size_is_the_most_that_the_capacity_holds(
    resources: ResourcesSpec, capacity: Capacity, expected: int
) -> None:
    assert world_size(resources, capacity) == expected


def test_too_few_cpus_are_named() -> None:
    with pytest.raises(EnvironmentUnusable) as caught:
        world_size(_resources(3, 4, cpus_per_worker=2), Capacity(num_cpus=4))
    assert "workers.min 3 needs 6 CPUs (resources.cpus_per_worker 2 each) and the target has 4." in str(caught.value)
    assert "GPU" not in caught.value.message
    assert "Lower resources.workers.min" in caught.value.next_step


def test_too_few_gpus_are_named() -> None:
    with pytest.raises(EnvironmentUnusable, match=r"2 GPUs \(resources.gpu 'H100'\) and the target has 1\."):
        world_size(_resources(2, 2, gpu="H100"), Capacity(num_cpus=8, num_gpus=1))


# --- batch split

batches = st.integers(1, 300).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size), st.integers(1, size + 5))
)


@given(batches)
def test_every_row_goes_to_exactly_one_rank_in_order(batch: tuple[int, int, int]) -> None:
    global_batch_size, ranks, limit = batch
    split = split_batch(global_batch_size, ranks, limit)
    assert [row for rank in range(ranks) for row in split.rows_of(rank)] == list(range(global_batch_size))


@given(batches)
def test_shares_are_even_and_the_first_ranks_get_the_extra(batch: tuple[int, int, int]) -> None:
    global_batch_size, ranks, limit = batch
    split = split_batch(global_batch_size, ranks, limit)
    shares = [len(split.rows_of(rank)) for rank in range(ranks)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1


@given(batches)
def test_micro_batches_keep_the_limit_with_least_accumulation_and_padding(batch: tuple[int, int, int]) -> None:
    global_batch_size, ranks, limit = batch
    split = split_batch(global_batch_size, ranks, limit)
    largest_share = len(split.rows_of(0))
    assert split.micro_rows <= limit
    assert split.accumulation * split.micro_rows >= largest_share
    assert (split.accumulation - 1) * limit < largest_share, "fewer micro-batches would not hold the rows"
    assert split.accumulation * (split.micro_rows - 1) < largest_share, "smaller micro-batches would not hold the rows"
    computed = ranks * split.accumulation * split.micro_rows
    assert split.num_padding_rows == computed - global_batch_size
    assert split.num_padding_rows < ranks * (split.accumulation + 1)


def test_an_uneven_split_by_hand() -> None:
    split = split_batch(32, 3, 8)
    assert [len(split.rows_of(rank)) for rank in range(3)] == [11, 11, 10]
    assert (split.accumulation, split.micro_rows, split.num_padding_rows) == (2, 6, 4)


def test_more_workers_than_rows_are_refused() -> None:
    with pytest.raises(SpecError, match="global_batch_size 2 is below the 3 workers"):
        split_batch(2, 3, 8)


@pytest.mark.parametrize("rank", [-1, 2])
def test_no_such_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        split_batch(4, 2, 8).rows_of(rank)


# --- steps


def test_steps_as_given_need_no_samples() -> None:
    assert num_steps(_train(), None, sequence_length=256) == 200
    assert num_steps(_train(), 5, sequence_length=256) == 200


def test_epochs_need_the_number_of_samples() -> None:
    train = _train(epochs=2.0, global_batch_size=32)
    assert num_steps(train, None, sequence_length=256) is None
    assert num_steps(train, 100, sequence_length=256) == 6


def test_epochs_count_as_the_decimal_that_was_written() -> None:
    assert int(0.29 * 100) == 28
    assert num_steps(_train(epochs=0.29, global_batch_size=1), 100, sequence_length=256) == 29


def test_epochs_too_short_for_one_step_are_refused() -> None:
    with pytest.raises(SpecError, match=r"epochs 0\.1 over 100 samples are less than one global batch of 32"):
        num_steps(_train(epochs=0.1, global_batch_size=32), 100, sequence_length=256)


def test_warm_up_as_long_as_the_epochs_is_refused() -> None:
    with pytest.raises(SpecError, match="warmup_steps 10 must be below the 10 steps"):
        num_steps(_train(epochs=1, global_batch_size=10, optimizer={"warmup_steps": 10}), 100, sequence_length=256)


def test_a_split_without_a_sample_is_refused() -> None:
    with pytest.raises(SpecError, match="sequence_length 256 is longer than the whole training split"):
        num_steps(_train(), 0, sequence_length=256)


# --- precision


@pytest.mark.parametrize(
    ("asked", "gpu", "native_bf16", "expected"),
    [
        ("auto", False, False, "fp32"),
        ("auto", False, True, "bf16"),
        ("auto", True, False, "fp32"),
        ("auto", True, True, "bf16"),
        ("fp32", True, True, "fp32"),
        ("bf16", True, True, "bf16"),
        ("fp16", True, False, "fp16"),
    ],
)
def test_precision(asked: Any, gpu: bool, native_bf16: bool, expected: str) -> None:
    assert resolve_precision(asked, gpu=gpu, native_bf16=native_bf16) == expected


@pytest.mark.parametrize(("asked", "device"), [("bf16", "CPU"), ("fp16", "GPU")])
def test_a_precision_that_the_device_lacks_is_refused(asked: Any, device: str) -> None:
    with pytest.raises(SpecError, match=f"train.precision {asked} is refused.*{device}"):
        resolve_precision(asked, gpu=False, native_bf16=False)


# --- memory


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(0, 16, 16, 96), (1, 16, 16, 24), (2, 16, 4, 24), (3, 4, 4, 24)],
)
def test_mixed_precision_states_are_divided_as_in_the_zero_paper(
    stage: int, parameters: int, gradients: int, optimizer: int
) -> None:
    """16 bytes a parameter, of 8 M parameters, over 4 ranks; in MB."""
    parts = _parts(_estimate(stage=stage), "device")
    found = (parts["parameters"], parts["gradients"], parts["optimizer state"])
    assert found == (parameters * MILLION, gradients * MILLION, optimizer * MILLION)
    assert parts.get("gathered parameters", 0) == (16 * MILLION if stage == 3 else 0)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, 8 * 8), (1, 12 * 2), (3, 12 * 2)])
def test_fp32_has_no_second_master_but_where_deepspeed_keeps_one(stage: int, optimizer: int) -> None:
    parts = _parts(_estimate(stage=stage, precision="fp32"), "device")
    assert parts["optimizer state"] == optimizer * MILLION


def test_offload_moves_the_optimizer_to_the_host() -> None:
    stays, moves = _estimate(stage=2), _estimate(stage=2, offload="cpu")
    assert "optimizer state" not in _parts(moves, "device")
    assert _parts(moves, "host")["optimizer state"] == 24 * MILLION
    assert _parts(moves, "host")["offloaded gradients"] == 8 * MILLION
    assert moves.device_bytes < stays.device_bytes
    assert moves.host_bytes > stays.host_bytes


def test_activations_are_those_of_the_paper_plus_gate_and_fp32_norms() -> None:
    """34·s·b·h a layer for an MLP of 4·h; the gate adds 2·2·4·h, fp32 norms 8·h."""
    tokens, hidden = 2 * 128, SIZE.hidden_size or 0
    assert _parts(_estimate(), "device")["activations"] == 4 * tokens * hidden * (34 + 16 + 8)


def test_logits_in_the_models_precision_in_fp32_and_their_gradient() -> None:
    tokens = 2 * 128
    assert _parts(_estimate(), "device")["logits"] == tokens * 4096 * 10
    assert _parts(_estimate(precision="fp32"), "device")["logits"] == tokens * 4096 * 12


def test_settings_of_deepspeed_bound_what_zero_holds_for_a_while() -> None:
    settings = {"zero_optimization": {"stage3_max_live_parameters": 10**6, "reduce_bucket_size": 10**5}}
    parts = _parts(_estimate(stage=3, deepspeed=settings), "device")
    assert parts["gathered parameters"] == 2 * max(10**6, SIZE.largest_parameter)
    assert parts["gradient bucket"] == 2 * 10**5
    unread = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    assert _estimate(stage=3, deepspeed=unread) == _estimate(stage=3)


def test_gpus_fill_one_bucket_while_another_is_sent() -> None:
    assert _parts(_estimate(stage=2), "device")["gradient bucket"] == 2 * 16 * MILLION
    assert _parts(_estimate(stage=3), "device")["gradient bucket"] == 16 * MILLION
    alone = {"zero_optimization": {"overlap_comm": False}}
    assert _parts(_estimate(stage=2, deepspeed=alone), "device")["gradient bucket"] == 16 * MILLION
    on_cpu = _estimate(stage=2, gpu=False, precision="fp32")
    assert _parts(on_cpu, "host")["gradient bucket"] == 32 * MILLION


def test_recomputed_activations_are_the_layers_inputs_and_one_layer() -> None:
    tokens, hidden = 2 * 128, SIZE.hidden_size or 0
    found = _parts(_estimate(activation_checkpointing=True), "device")["activations"]
    assert found == 4 * tokens * 2 * hidden + tokens * hidden * (34 + 16 + 8)


def test_frozen_parameters_cost_neither_gradient_nor_state() -> None:
    adapter = SIZE.model_copy(update={"num_trainable": 0})
    labels = _parts(_estimate(adapter), "device") | _parts(_estimate(adapter), "host")
    assert not {"gradients", "gradient bucket", "optimizer state", "checkpoint snapshot"} & set(labels)


def test_a_cpu_worker_has_everything_on_the_host() -> None:
    estimate = _estimate(gpu=False, precision="fp32")
    assert estimate.device_bytes == 0
    assert _parts(estimate, "host")["process"] == PROCESS_BYTES
    assert _parts(estimate, "host")["checkpoint snapshot"] == 24 * MILLION


@pytest.mark.parametrize(("stage", "measured_mb"), [(0, 1808), (1, 1875), (2, 1826), (3, 1983)])
def test_the_estimate_is_near_what_was_measured(stage: int, measured_mb: int) -> None:
    """Peak resident memory of a 21 M-parameter Llama in fp32 on 2 CPU workers, 4 rows of 256 tokens, no checkpoint."""
    size = ModelSize(
        num_parameters=20_976_128,
        num_trainable=20_976_128,
        largest_parameter=4096 * 512,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=4,
        num_attention_heads=4,
        vocab_size=4096,
    )
    estimate = _estimate(
        size, stage=stage, precision="fp32", world_size=2, micro_rows=4, sequence_length=256, gpu=False
    )
    snapshot = _parts(estimate, "host")["checkpoint snapshot"] * 1.15
    assert (estimate.host_bytes - snapshot) / (measured_mb * MILLION) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    ("device_limit", "host_limit", "expected"),
    [
        (2**40, 2**40, True),
        (1, 2**40, False),
        (2**40, 1, False),
        (None, 2**40, None),
        (2**40, None, None),
        (None, 1, False),
    ],
)
def test_fits(device_limit: int | None, host_limit: int | None, expected: bool | None) -> None:
    assert _estimate(device_limit_bytes=device_limit, host_limit_bytes=host_limit).fits is expected


def test_what_cannot_be_counted_is_said_and_never_called_fitting() -> None:
    vague = ModelSize(num_parameters=MILLION, num_trainable=MILLION, largest_parameter=MILLION)
    estimate = _estimate(vague, device_limit_bytes=2**40, host_limit_bytes=2**40)
    assert estimate.not_counted == ("activations",)
    assert estimate.fits is None
    assert _estimate(vague, device_limit_bytes=1, host_limit_bytes=2**40).fits is False


@given(
    stage=st.integers(0, 3), ranks=st.integers(1, 64), gpu=st.booleans(), precision=st.sampled_from(["fp32", "bf16"])
)
def test_a_higher_stage_or_more_workers_never_need_more_state(
    stage: int, ranks: int, gpu: bool, precision: str
) -> None:
    def states(stage: int, ranks: int) -> int:
        estimate = _estimate(stage=stage, world_size=ranks, gpu=gpu, precision=precision)
        wanted = ("parameters", "gradients", "optimizer state")
        return sum(part.num_bytes for part in estimate.parts if part.label in wanted)

    assert states(stage, ranks + 1) <= states(stage, ranks)
    assert stage in (0, 3) or states(stage + 1, ranks) <= states(stage, ranks)


def test_the_bucket_is_even_and_no_larger_than_the_model_needs() -> None:
    assert bucket_elements(8 * MILLION) == 8 * MILLION
    assert bucket_elements(8 * MILLION + 1) == 8 * MILLION + 2
    assert bucket_elements(10**10) == 50 * MILLION
    assert bucket_elements(0) == 2


# --- the plan


def _plan(**fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "train": _train(global_batch_size=32, micro_batch_size=8),
        "resources": _resources(1, 3),
        "sequence_length": 256,
        "capacity": Capacity(num_cpus=4, host_memory_bytes=24 * 2**30),
        "size": SIZE,
    }
    return plan(**(defaults | fields))


def test_a_plan_reads_well() -> None:
    rows = dict(_plan().lines())
    assert rows["workers"] == "3, each 1 CPU and no GPU"
    assert rows["steps"] == "200"
    assert rows["global batch"] == "32 rows of 256 tokens = 8,192 tokens a step, and 4 rows of padding"
    assert rows["per worker"] == "2 × 6 rows"
    assert rows["ZeRO"] == "stage 2"
    assert rows["precision"] == "fp32"
    assert rows["parameters"] == "8,000,000"
    assert rows["host memory per worker"].endswith("GiB of 8.0 GiB")
    assert rows["memory"] == "fits"


def test_what_is_unknown_is_said() -> None:
    rows = dict(_plan(train=_train(epochs=1), size=None, size_note="needs transformers").lines())
    assert rows["steps"] == "unknown until the data is prepared"
    assert rows["memory per worker"] == "unknown: needs transformers"
    assert "parameters" not in rows


def test_a_plan_that_does_not_fit_says_so() -> None:
    rows = dict(_plan(capacity=Capacity(num_cpus=4, host_memory_bytes=2**30)).lines())
    assert rows["memory"] == "does not fit"


def test_a_plan_for_gpus() -> None:
    capacity = Capacity(num_cpus=8, num_gpus=2, device_memory_bytes=80 * 2**30, native_bf16=True)
    train = _train(zero={"stage": 2, "offload": "cpu"})
    rows = dict(_plan(train=train, resources=_resources(2, 2, gpu="H100"), capacity=capacity).lines())
    assert rows["workers"] == "2, each 1 CPU and 1 GPU (H100)"
    assert rows["ZeRO"] == "stage 2, optimizer offloaded to cpu"
    assert rows["precision"] == "bf16"
    assert rows["device memory per worker"].endswith("GiB of 80.0 GiB") or "MiB of" in rows["device memory per worker"]
    assert rows["memory"] == "unknown whether it fits"


def test_a_plan_survives_json() -> None:
    made = _plan()
    assert Plan.model_validate_json(made.model_dump_json()) == made
    document = json.loads(json.dumps(made.to_json()))
    assert document["format"] == "headway/plan/1"
    assert document["tokens_per_step"] == 8192
    assert document["memory"]["fits"] is True
    assert document["memory"]["host_bytes"] == (made.memory.host_bytes if made.memory else None)


def test_a_plan_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="headway/plan/1"):
        Plan.model_validate({**_plan().model_dump(), "format": "headway/plan/2"})


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (150 * 2**20, "150 MiB"),
        (1536 * 2**20, "1.5 GiB"),
        (2**44, "16.0 TiB"),
    ],
)
def test_bytes_for_people(num_bytes: int, shown: str) -> None:
    assert human_bytes(num_bytes) == shown
