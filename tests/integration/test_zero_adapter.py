"""The adapter to DeepSpeed's optimizers, on real ranks: what it reads at one stage and size goes on at any other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import RunError
from tests.gloo_ranks import Ranks
from tests.integration.zero_ranks import (
    ANSWER_TIMEOUT_S,
    DTYPES,
    LEFT_OUT,
    Filled,
    Piece,
    Setup,
    Snapshot,
    Visit,
    Whole,
    progress,
    visit,
)
from workloads.engine import build_cpu_op

SIZES = (1, 2, 3)
needs_fp16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed refuses fp16 on a CPU that lacks it"
)
few = settings(
    derandomize=True, deadline=None, database=None, max_examples=2, phases=[Phase.explicit, Phase.generate]
)  # fmt: skip
"""An example visits up to twelve engines, so few are drawn besides the hardest one, the same each time."""

ALL_KINDS = (
    Piece(shape=(1,), group=1),
    Piece(shape=(7, 11), is_tied=True),
    Piece(shape=(129, 131), group=1),
    Piece(shape=(3, 5, 7), group=2),
    Piece(shape=(13, 17), trains=False),
    Piece(shape=(1,), trains=False),
    Piece(shape=(2,), trains=False, is_tied=True),
)
"""One element, odd, more than a 64 KiB block; tied, frozen, in three groups; kept gathered by ZeRO-3 or not."""


@st.composite
def models(draw: st.DrawFn) -> tuple[Piece, ...]:
    shapes = st.one_of(
        st.sampled_from([(1,), (16_385,), (1, 1, 1)]),
        st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    )
    pieces = st.builds(
        Piece, shape=shapes, trains=st.sampled_from([True, True, False]), group=st.integers(0, 2), is_tied=st.booleans()
    )
    drawn = draw(st.lists(pieces, min_size=1, max_size=6))
    return (Piece(shape=draw(shapes)), *drawn)


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    build_cpu_op()
    held = {size: Ranks(size, first_port=21100 + 100 * size, answer_timeout_s=ANSWER_TIMEOUT_S) for size in SIZES}
    yield held
    for group in held.values():
        group.close()


@pytest.fixture(scope="module")
def deepspeed_adam() -> None:
    """Compile FusedAdam and DeepSpeedCPUAdam for the CPU: about two minutes, once on a machine."""
    build_cpu_op()  # with the same ninja
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder

    for builder in (CPUAdamBuilder(), FusedAdamBuilder()):
        builder.load(verbose=False)


def every_setup(precision: str, sizes: tuple[int, ...] = SIZES) -> list[Setup]:
    """Each stage at each size; neighbours differ in both."""
    order = [(stage, sizes[(stage + turn) % len(sizes)]) for turn in range(len(sizes)) for stage in (0, 1, 2, 3)]
    return [Setup(stage=stage, size=size, precision=precision) for stage, size in order]


OFFLOADED = [Setup(stage=stage, size=size, offload=True) for stage, size in ((1, 2), (2, 3), (3, 2), (3, 1), (1, 3))]


@few
@example(pieces=ALL_KINDS)
@given(pieces=models())
def test_fp32_goes_on_at_any_stage_and_size(ranks: dict[int, Ranks], pieces: tuple[Piece, ...]) -> None:
    travel(ranks, pieces, every_setup("fp32"), tolerance=1e-6)


@few
@example(pieces=ALL_KINDS)
@given(pieces=models())
def test_offloaded_state_comes_and_goes(ranks: dict[int, Ranks], pieces: tuple[Piece, ...]) -> None:
    setups = [Setup(stage=0, size=1), *OFFLOADED, Setup(stage=3, size=2), Setup(stage=2, size=1)]
    travel(ranks, pieces, setups, tolerance=1e-6)


@few
@example(pieces=ALL_KINDS)
@given(pieces=models())
@pytest.mark.full
def test_bf16_goes_on_at_any_stage_and_size(ranks: dict[int, Ranks], pieces: tuple[Piece, ...]) -> None:
    setups = every_setup("bf16", sizes=(1, 2))
    accumulated = [Setup(stage=1, size=size, precision="bf16", fp32_accumulation=True) for size in (2, 1)]
    offloaded = [Setup(stage=stage, size=2, precision="bf16", offload=True) for stage in (1, 2, 3)]
    visits = travel(ranks, pieces, [*setups, *accumulated, *offloaded], tolerance=1e-6)
    assert {visit.optimizer for visit in visits} == {
        "FP16_UnfusedOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer",
    }  # fmt: skip


@needs_fp16
@few
@example(pieces=ALL_KINDS)
@given(pieces=models())
def test_fp16_goes_on_at_any_stage_and_size(ranks: dict[int, Ranks], pieces: tuple[Piece, ...]) -> None:
    offloaded = [Setup(stage=stage, size=2, precision="fp16", offload=True) for stage in (2, 3, 1)]
    travel(ranks, pieces, [*every_setup("fp16", sizes=(1, 2)), *offloaded], tolerance=1e-6)


@needs_fp16
def test_a_loss_scale_that_overflows_goes_on(ranks: dict[int, Ranks]) -> None:
    setups = [Setup(stage=stage, size=2, precision="fp16", scale_power=16) for stage in (1, 3, 2)]
    visits = travel(ranks, ALL_KINDS, setups, tolerance=1e-6)
    scalers = [visit.snapshots[moment].loss_scaler or {} for visit in visits[:2] for moment in (0, 1, 2)]
    assert [scaler["cur_hysteresis"] for scaler in scalers] == [2, 1, 1, 1, 1, 1]
    assert [scaler["cur_scale"] for scaler in scalers] == [65536, 65536, 32768, 65536, 32768, 16384]


@pytest.mark.full  # two ops are compiled first, a minute each
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=needs_fp16)])
def test_deepspeeds_own_adam_goes_on(ranks: dict[int, Ranks], deepspeed_adam: None, precision: str) -> None:
    """FusedAdam, which a GPU has, and DeepSpeedCPUAdam where the state is offloaded: both run on a CPU too."""
    places = [(0, 2, False), (1, 1, True), (0, 1, False)]
    if precision == "fp32":
        places += [(3, 2, True), (2, 1, False), (2, 2, True), (3, 1, False)]
    setups = [
        Setup(stage=stage, size=size, precision=precision, offload=offload, own_adam=True)
        for stage, size, offload in places
    ]
    visits = travel(ranks, ALL_KINDS, setups, tolerance=1e-6)
    assert visits[0].optimizer == ("FusedAdam" if precision == "fp32" else "FP16_Optimizer")


def test_a_parameter_outside_the_optimizer_is_refused(ranks: dict[int, Ranks]) -> None:
    with pytest.raises(RunError, match=r"waves\.1\.weight"):
        ranks[1].run(visit, (Piece(shape=(3,)), Piece(shape=(2,), group=LEFT_OUT)), Setup(stage=0, size=1), None)


def test_parameters_without_dimensions_are_refused_by_name(ranks: dict[int, Ranks]) -> None:
    with pytest.raises(RunError, match=r"waves\.1\.weight"):
        ranks[1].run(progress, (Piece(shape=(3,)), Piece(shape=())), Setup(stage=0, size=1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_itself_takes_no_parameter_without_dimensions(ranks: dict[int, Ranks], stage: int) -> None:
    """Where this fails, DeepSpeed has mended it: let the engine take them, and add one to ALL_KINDS."""
    with pytest.raises(RuntimeError, match=r"dim\(\) cannot be 0"):
        ranks[1].run(visit, (Piece(shape=()),), Setup(stage=stage, size=1), None)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3), pytest.param("fp16", 1e-3, marks=needs_fp16)]
)
def test_the_engine_trains_alike_at_every_stage(ranks: dict[int, Ranks], precision: str, tolerance: float) -> None:
    pieces = (Piece(shape=(129, 131)), Piece(shape=(1000,)), Piece(shape=(13, 17), trains=False))
    found = [
        ranks[2].run(progress, pieces, Setup(stage=stage, size=2, precision=precision, offload=offload))[0]
        for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))
    ]
    for one in found:
        assert one.optimizer_step == 3
        assert one.losses == pytest.approx(found[0].losses, rel=tolerance)
        assert one.norms == pytest.approx(found[0].norms, rel=tolerance)
        assert min(one.norms) > 0


def travel(ranks: dict[int, Ranks], pieces: tuple[Piece, ...], setups: list[Setup], *, tolerance: float) -> list[Visit]:
    """Carry the state through all setups. Each must start where the one before stood after a step, and then take
    the same next step."""
    filled, before, visits = None, None, []
    for setup in setups:
        found = ranks[setup.size].run(visit, pieces, setup, filled)
        check(found, pieces, setup)
        first = found[0]
        if before is not None:
            assert_same(whole_of(found, 0), filled.whole)
            assert first.losses[:2] == pytest.approx(before.losses[1:], rel=tolerance), setup
            for mine, theirs in zip(first.snapshots[:2], before.snapshots[1:], strict=True):
                assert mine.optimizer_step == theirs.optimizer_step
                assert_same_scale(mine.loss_scaler, theirs.loss_scaler)
        filled = Filled(
            whole=whole_of(found, 1),
            optimizer_step=first.snapshots[1].optimizer_step,
            loss_scaler=first.snapshots[1].loss_scaler,
        )
        before = first
        visits.append(first)
    return visits


def check(found: list[Visit], pieces: tuple[Piece, ...], setup: Setup) -> None:
    """Ranks agree, and what they hold is the parameters, each element once."""
    first = found[0]
    dtype = DTYPES[setup.precision]
    assert sorted(first.shapes.values()) == sorted(p.shape for p in pieces if p.trains)
    assert sorted(first.frozen_shapes.values(), key=str) == sorted(
        ((dtype, p.shape) for p in pieces if not p.trains), key=str
    )
    assert first.is_replicated == (setup.stage == 0)
    assert first.frozen_is_replicated == (setup.stage < 3)
    for other in found[1:]:
        assert (other.shapes, other.frozen_shapes) == (first.shapes, first.frozen_shapes)
        assert other.losses == first.losses
        assert other.snapshots[-1].loss_scaler == first.snapshots[-1].loss_scaler
    for moment in range(3):
        whole = whole_of(found, moment)
        assert whole.keys() == first.shapes.keys() | first.frozen_shapes.keys()
        for name, kinds in whole.items():
            weights = kinds["frozen" if name in first.frozen_shapes else "fp32"]
            low = torch.from_numpy(weights).to(dtype).float().numpy()
            for one in found:
                np.testing.assert_array_equal(one.weights[moment][name], low, err_msg=f"{setup} {name}")


def whole_of(found: list[Visit], moment: int) -> Whole:
    """Put the ranks' fragments together; every element must come once, from each rank where it is replicated."""
    snapshots = [one.snapshots[moment] for one in found]
    whole = assemble(snapshots, "fragments", found[0].shapes, replicated=found[0].is_replicated)
    frozen_shapes = {name: shape for name, (_, shape) in found[0].frozen_shapes.items()}
    return whole | assemble(snapshots, "frozen", frozen_shapes, replicated=found[0].frozen_is_replicated)


def assemble(snapshots: list[Snapshot], what: str, shapes: dict[str, tuple[int, ...]], *, replicated: bool) -> Whole:
    whole: Whole = {}
    filled = {name: np.zeros(int(np.prod(shape)), dtype=int) for name, shape in shapes.items()}
    for name, start, tensors in itertools.chain.from_iterable(getattr(s, what) for s in snapshots):
        for kind, values in tensors.items():
            target = whole.setdefault(name, {}).setdefault(kind, np.full(filled[name].size, np.nan, np.float32))
            part = target[start : start + values.size]
            assert replicated or np.isnan(part).all()
            assert np.isnan(part).all() or np.array_equal(part, values)
            part[:] = values
        filled[name][start : start + values.size] += 1
    assert all((count == (len(snapshots) if replicated else 1)).all() for count in filled.values())
    return whole


def assert_same(one: Whole, other: Whole) -> None:
    assert one.keys() == other.keys()
    for name, kinds in one.items():
        for kind, values in kinds.items():
            np.testing.assert_array_equal(values, other[name][kind], err_msg=f"{name} {kind}")


def assert_same_scale(one: dict[str, float] | None, other: dict[str, float] | None) -> None:
    """In all that both know: ZeRO-0 knows no hysteresis."""
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        common = one.keys() & other.keys()
        assert common >= {"cur_scale", "cur_iter", "last_overflow_iter"}
        assert {name: one[name] for name in common} == {name: other[name] for name in common}
