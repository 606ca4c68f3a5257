"""The task of both contenders in recovery: the causal language model, and a line in a file as each step begins."""

from __future__ import annotations

import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch import Tensor, distributed, nn

from workloads.tasks import Batch
from workloads.tasks.causal_lm import CausalLM

FOLDER_VARIABLE = "HEADWAY_BENCH_TRACE"


class Begun(NamedTuple):
    """A step that a process began, one micro-batch each. ``step`` is how many were done before, over all restarts."""

    time_s: float
    step: int
    rank: int
    pid: int


class TracedLM(CausalLM):
    """Appends to a file per process, so that nothing but the kernel stands between a line and its reader."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        self._file.write(f"{time.time()} {steps_done(model)} {distributed.get_rank()} {os.getpid()}\n")
        return super().loss_sum(model, batch)

    @cached_property
    def _file(self) -> TextIO:
        return (Path(os.environ[FOLDER_VARIABLE]) / str(os.getpid())).open("a", buffering=1)


def steps_done(engine: Any) -> int:
    """Optimizer steps behind these weights: Adam's own count, which both kinds of checkpoint bring back."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state), default=0)


def read_traces(folder: Path) -> list[Begun]:
    """What was written so far, in the order of time; a line that is being written is left out."""
    found = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                time_s, step, rank, pid = line.split()
                found.append(Begun(float(time_s), int(step), int(rank), int(pid)))
    return sorted(found)
