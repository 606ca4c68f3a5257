"""One rank of checkpoint_stall: real training steps, and saves by each contender in turn, with idle steps between."""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from orchestrator.store import WorkerGroup, open_store
from tests.bench.proc import child_pids, cpu_seconds
from tests.bench.stall_contenders import (
    AsyncSave,
    Contender,
    DeepSpeedThenUpload,
    Headway,
    Memcpy,
    state_tensors,
)
from tests.gloo_ranks import join_group

IDLE_STEPS = 4
BEYOND_STEPS = 2
"""Steps watched after a save is through: what it left behind (write-back, collection) costs them too."""
ORDER = ("headway", "deepspeed", "async_save", "memcpy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a rank needs to know. Sizes are of a Llama model."""

    world_size: int
    port: int
    store: str
    group: WorkerGroup
    storage_path: str
    """Of the contenders that upload through pyarrow."""
    server_pid: int
    scratch: Path
    rounds: int
    contenders: tuple[str, ...]
    stage: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    sequence_length: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """One save: from its beginning until all ranks are through and ``BEYOND_STEPS`` more. Seconds, worst rank's."""

    contender: str
    blocked_s: float
    steps: int
    wall_s: float
    idle_step_s: float
    upload_steps: int
    """Steps taken until the save was seen to be through."""
    upload_wall_s: float
    """Of those steps alone, without what blocked before them."""
    server_cpu_s: float
    rank_cpu_s: float
    """All ranks' threads beside the training thread, and their helper processes."""

    @property
    def lost_s(self) -> float:
        return self.wall_s - self.steps * self.idle_step_s

    @property
    def upload_rate(self) -> float:
        """Tokens per second during the upload over those of idle steps."""
        return self.idle_step_s * self.upload_steps / self.upload_wall_s


def run_rank(rank: int, settings: Settings, answers: Connection) -> None:
    """A rank's whole life. Rank 0 sends each counted round's windows as they come, then None."""
    join_group(rank, settings.world_size, settings.port)
    trainer = Trainer(settings, rank)
    contenders = make_contenders(settings, trainer, rank)
    if rank == 0:
        answers.send({"state_bytes": trainer.state_bytes})
    for number in range(settings.rounds + 1):  # the first warms everything up: buffers, processes, connections
        shift = number % len(settings.contenders)
        for name in settings.contenders[shift:] + settings.contenders[:shift]:
            window = measure(trainer, name, contenders[name], settings)
            if rank == 0:
                answers.send({"round": number, **asdict(window)})
    for contender in contenders.values():
        contender.close()
    if rank == 0:
        answers.send(None)
    dist.barrier()


def make_contenders(settings: Settings, trainer: Trainer, rank: int) -> dict[str, Contender]:
    tensors = state_tensors(trainer.engine)
    own_group = dist.new_group(backend="gloo")
    makers: dict[str, Any] = {
        "headway": lambda: Headway(
            open_store(settings.store), settings.group, trainer.engine, rank=rank, world_size=settings.world_size
        ),
        "deepspeed": lambda: DeepSpeedThenUpload(settings.storage_path, settings.scratch, trainer.engine, rank=rank),
        "async_save": lambda: AsyncSave(settings.storage_path, settings.scratch, tensors, rank=rank, group=own_group),
        "memcpy": lambda: Memcpy(tensors),
    }
    return {name: makers[name]() for name in settings.contenders}


class Trainer:
    """A Llama model under ZeRO on random tokens; the batches lie ready."""

    def __init__(self, settings: Settings, rank: int) -> None:
        import transformers

        from orchestrator.plan import split_batch
        from orchestrator.spec import OptimizerSpec, TrainSpec, ZeroSpec
        from workloads.engine import Engine

        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=settings.hidden_size,
                intermediate_size=8 * settings.hidden_size // 3,
                num_hidden_layers=settings.num_layers,
                num_attention_heads=max(1, settings.hidden_size // 64),
                vocab_size=settings.vocab_size,
                max_position_embeddings=settings.sequence_length,
            )
        )
        train = TrainSpec(
            steps=10**6,
            global_batch_size=settings.world_size,
            micro_batch_size=1,
            optimizer=OptimizerSpec(learning_rate=1e-4),
            zero=ZeroSpec(stage=settings.stage),  # type: ignore[arg-type]
            precision="fp32",
        )
        split = split_batch(settings.world_size, settings.world_size, 1)
        self.engine = Engine(model, train=train, split=split, precision="fp32", device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(rank)
        self._tokens = torch.randint(0, settings.vocab_size, (8, 1, settings.sequence_length), generator=generator)
        self._step = 0
        self.state_bytes = 12 * sum(f.length for f in self.engine.state.fragments()) * settings.world_size
        for _ in range(3):
            self.step(ready=True)

    def step(self, *, ready: bool) -> tuple[float, bool]:
        """One optimizer step. Returns its seconds, and whether all ranks were ``ready`` at its end."""
        started = time.perf_counter()
        batch = self._tokens[self._step % len(self._tokens)]
        loss = self.engine.module(input_ids=batch, labels=batch, use_cache=False).loss
        self.engine.backward(loss, global_targets=dist.get_world_size())
        self.engine.step(1e-4)
        self._step += 1
        agreed = torch.tensor(float(ready))
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return time.perf_counter() - started, bool(agreed)

    @property
    def num_steps(self) -> int:
        return self._step


def measure(trainer: Trainer, name: str, contender: Contender, settings: Settings) -> Window:
    """Idle steps, a save with the steps behind it, and idle steps again."""
    idle = [trainer.step(ready=True)[0] for _ in range(IDLE_STEPS)]
    dist.barrier()
    server_cpu_s, rank_cpu_s = cpu_seconds(settings.server_pid), _background_cpu_s()
    started = time.perf_counter()
    contender.begin(trainer.num_steps)
    blocked_s = time.perf_counter() - started
    dist.barrier()  # what one rank waits for, all wait for
    steps, through = 0, False
    unblocked = time.perf_counter()
    while not through:
        _, through = trainer.step(ready=contender.done())
        steps += 1
    upload_steps, upload_wall_s = steps, time.perf_counter() - unblocked
    rank_cpu_s = _background_cpu_s() - rank_cpu_s
    server_cpu_s = cpu_seconds(settings.server_pid) - server_cpu_s
    for _ in range(BEYOND_STEPS):
        trainer.step(ready=True)
        steps += 1
    wall_s = time.perf_counter() - started
    contender.check()
    dist.barrier()
    idle += [trainer.step(ready=True)[0] for _ in range(IDLE_STEPS)]
    return Window(
        contender=name,
        blocked_s=_over_ranks(blocked_s, dist.ReduceOp.MAX),
        steps=steps,
        wall_s=_over_ranks(wall_s, dist.ReduceOp.MAX),
        idle_step_s=statistics.median(idle),
        upload_steps=upload_steps,
        upload_wall_s=upload_wall_s,
        server_cpu_s=server_cpu_s,
        rank_cpu_s=_over_ranks(rank_cpu_s, dist.ReduceOp.SUM),
    )


def _background_cpu_s() -> float:
    """CPU seconds so far of everything in this rank but the thread that asks, its helper processes included."""
    assert threading.current_thread() is threading.main_thread()
    children = sum(cpu_seconds(pid) for pid in child_pids(os.getpid()))
    return time.process_time() - time.thread_time() + children


def _over_ranks(value: float, how: Any) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=how)
    return float(tensor)
