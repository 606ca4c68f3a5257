"""Small models under real DeepSpeed engines on gloo ranks, for the tests of the adapter to its optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.checkpoint.zero import OwnedFragment, ZeroState
from orchestrator.plan import split_batch
from orchestrator.spec import OptimizerSpec, TrainSpec, ZeroSpec
from workloads.engine import Engine

ANSWER_TIMEOUT_S = 300.0  # ends what hangs; on a slow machine the ranks alone take a minute to start
LEFT_OUT = -1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Whole = dict[str, dict[str, np.ndarray[Any, Any]]]
"""Per parameter and kind (fp32, exp_avg, exp_avg_sq; frozen), all its elements as fp32."""


# -- the model


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One parameter of the model."""

    shape: tuple[int, ...]
    trains: bool = True
    group: int = 0
    """Of the optimizer; LEFT_OUT for none."""
    is_tied: bool = False
    """Used a second time, by another module."""


class Wave(nn.Module):
    """A parameter whose every element bends the output differently."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(-1)
        phase = torch.linspace(0, 3, flat.numel(), dtype=flat.dtype)
        return torch.tanh(x[:, None] * flat + phase).mean(dim=1)


class Waves(nn.Module):
    """The sum of all pieces; from a batch, the loss."""

    def __init__(self, pieces: tuple[Piece, ...], *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.waves = nn.ModuleList()
        for piece in pieces:
            weight = nn.Parameter(torch.randn(piece.shape, generator=generator), requires_grad=piece.trains)
            self.waves.extend([Wave(weight), Wave(weight)] if piece.is_tied else [Wave(weight)])

    def forward(self, x: Tensor) -> Tensor:
        total = torch.stack([wave(x) for wave in self.waves]).float().sum(dim=0)
        return (total - torch.cos(x.float())).square().mean()


# -- one engine


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a group trains."""

    stage: int
    size: int
    precision: str = "fp32"
    offload: bool = False
    own_adam: bool = False
    """DeepSpeed's own Adam instead of torch's."""
    fp32_accumulation: bool = False
    scale_power: int = 6
    """fp16: the loss scale starts at 2 to the power of this; 16 overflows."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank's adapter tells, with every tensor as fp32 so that it can be sent."""

    fragments: list[tuple[str, int, dict[str, np.ndarray[Any, Any]]]]
    frozen: list[tuple[str, int, dict[str, np.ndarray[Any, Any]]]]
    optimizer_step: int
    loss_scaler: dict[str, float | int | bool] | None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One rank's engine, filled and trained. All lists by time: as filled, after a step, after another."""

    optimizer: str
    """Name of DeepSpeed's class."""
    shapes: dict[str, tuple[int, ...]]
    frozen_shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    is_replicated: bool
    frozen_is_replicated: bool
    snapshots: list[Snapshot]
    weights: list[dict[str, np.ndarray[Any, Any]]]
    """The whole parameters that compute, as DeepSpeed itself gathers them."""
    losses: list[float]


def visit(pieces: tuple[Piece, ...], setup: Setup, filled: Filled | None) -> Visit:
    """Build an engine, fill it if there is something to fill it with, and train two steps."""
    engine = _build(pieces, setup, seed=1 if filled is None else 2)
    state = ZeroState(engine)
    if filled is not None:
        _fill(state, filled)
    snapshots, weights, losses = [_snapshot(state)], [_weights(engine)], [_loss(engine, setup)]
    for _ in range(2):
        _step(engine, setup)
        snapshots.append(_snapshot(ZeroState(engine)))  # a second adapter changes nothing and reads the same
        weights.append(_weights(engine))
        losses.append(_loss(engine, setup))
    found = Visit(
        optimizer=type(engine.optimizer).__name__,
        shapes=state.shapes,
        frozen_shapes=state.frozen_shapes,
        is_replicated=state.is_replicated,
        frozen_is_replicated=state.frozen_is_replicated,
        snapshots=snapshots,
        weights=weights,
        losses=losses,
    )
    engine.destroy()
    return found


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What to fill an engine with."""

    whole: Whole
    optimizer_step: int
    loss_scaler: dict[str, float | int | bool] | None


def _build(pieces: tuple[Piece, ...], setup: Setup, *, seed: int) -> Any:
    import deepspeed

    model = Waves(pieces, seed=seed)
    distinct = list(model.parameters())
    groups: dict[int, list[nn.Parameter]] = {}
    for piece, parameter in zip(pieces, distinct, strict=True):
        if piece.trains and piece.group != LEFT_OUT:
            groups.setdefault(piece.group, []).append(parameter)
    zero: dict[str, Any] = {"stage": setup.stage, "stage3_param_persistence_threshold": 100}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": not setup.own_adam}},
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
    }
    if setup.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if setup.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if setup.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": setup.scale_power, "loss_scale_window": 2}
    if setup.fp32_accumulation:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": p, "weight_decay": 0.1 * number} for number, p in sorted(groups.items())],
        config=config,
        dist_init_required=False,
    )
    return engine


def _batch(setup: Setup) -> Tensor:
    """The same on every rank, so that gradients do not depend on the size."""
    return torch.tensor([-0.5, 0.1, 0.7, 1.3], dtype=DTYPES[setup.precision])


def _loss(engine: Any, setup: Setup) -> float:
    with torch.no_grad():
        return float(engine(_batch(setup)))


def _step(engine: Any, setup: Setup) -> None:
    loss = engine(_batch(setup))
    if setup.precision == "fp16" and setup.stage == 0:
        loss = loss * engine.optimizer.loss_scale  # DeepSpeed itself does so at the other stages only
    engine.backward(loss)
    engine.step()


def _fill(state: ZeroState, filled: Filled) -> None:
    for fragment in state.fragments() + state.frozen():
        for kind, target in fragment.tensors.items():
            source = torch.from_numpy(filled.whole[fragment.parameter][kind])
            target.copy_(source[fragment.start : fragment.start + fragment.length])
    state.optimizer_step = filled.optimizer_step
    state.loss_scaler = filled.loss_scaler
    state.refresh()


def _snapshot(state: ZeroState) -> Snapshot:
    def sent(fragments: list[OwnedFragment]) -> list[tuple[str, int, dict[str, np.ndarray[Any, Any]]]]:
        return [(f.parameter, f.start, {k: t.float().numpy().copy() for k, t in f.tensors.items()}) for f in fragments]

    return Snapshot(
        fragments=sent(state.fragments()),
        frozen=sent(state.frozen()),
        optimizer_step=state.optimizer_step,
        loss_scaler=state.loss_scaler,
    )


def _weights(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    from deepspeed import zero

    named = dict(engine.module.named_parameters())
    with zero.GatheredParameters(list(named.values()) if engine.zero_optimization_stage() == 3 else []):
        return {name: p.detach().float().reshape(-1).numpy().copy() for name, p in named.items()}


# -- Headway's own engine


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What three steps of :class:`workloads.engine.Engine` came to."""

    losses: list[float]
    norms: list[float]
    optimizer_step: int


def progress(pieces: tuple[Piece, ...], setup: Setup) -> Progress:
    """Three steps of two micro-batches each, which all ranks compute alike."""
    global_batch = 8 * setup.size
    train = TrainSpec(
        steps=10,
        global_batch_size=global_batch,
        micro_batch_size=4,
        optimizer=OptimizerSpec(learning_rate=0.02),
        zero=ZeroSpec(stage=setup.stage, offload="cpu" if setup.offload else "none"),
    )
    engine = Engine(
        Waves(pieces, seed=1),
        train=train,
        split=split_batch(global_batch, setup.size, 4),
        precision=setup.precision,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
    losses, norms = [], []
    for _ in range(3):
        for _ in range(2):
            loss = engine.module(_batch(setup))
            engine.backward(4 * loss, global_targets=global_batch)
        norms.append(engine.step(0.02))
        losses.append(float(loss.detach()))
    return Progress(losses=losses, norms=norms, optimizer_step=engine.state.optimizer_step)
