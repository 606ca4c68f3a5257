"""The held-out split, looked at while training goes on, and when that ends training early.

A look is a forward pass of all ranks over the same samples each time, on the weights as they train. What it decides
travels in the checkpoint (:attr:`orchestrator.checkpoint.format.State.extra`), so that a resumed run goes on counting
where it was, and whoever finds the checkpoint of a run that ended early can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import distributed as dist

from orchestrator.checkpoint.catalog import committed_steps, manifests
from orchestrator.checkpoint.format import Manifest
from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.errors import IntegrityError
from orchestrator.plan import BatchSplit
from orchestrator.spec import EvaluateSpec, RunSpec
from orchestrator.store import Store
from workloads.engine import Engine
from workloads.evaluate import row_rng
from workloads.tasks import Samples, Task

_EXTRA = "looks"


class Looks(BaseModel):
    """What the looks so far came to. Pure; kept as JSON in the checkpoint's ``extra``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    best_loss: float | None = None
    """None before the first look that gave a number."""
    best_step: int = 0
    at_step: int = -1
    """The newest look."""
    num_without_improvement: int = 0
    """Looks since the best one."""
    ended_early: bool = False

    def after(self, loss: float, *, step: int, limits: EvaluateSpec) -> Looks:
        """These looks and one more. A loss that is not a number is no improvement."""
        best = self.best_loss
        if math.isfinite(loss) and (best is None or (loss < best and best - loss >= limits.min_improvement)):
            return Looks(best_loss=loss, best_step=step, at_step=step)
        count = self.num_without_improvement + 1
        ended = limits.patience is not None and count >= limits.patience
        return self.model_copy(update={"at_step": step, "num_without_improvement": count, "ended_early": ended})

    def as_extra(self) -> dict[str, Any]:
        return {_EXTRA: self.model_dump(mode="json")}

    @classmethod
    def of_extra(cls, extra: dict[str, Any]) -> Looks:
        """
        Raises:
            IntegrityError: they are there and not readable.
        """
        try:
            return cls.model_validate(extra.get(_EXTRA, {}))
        except ValidationError as e:
            raise IntegrityError(f"The checkpoint's looks at the held-out split cannot be read: {e}.") from e


def last_step(store: Store, run_id: str, *, total_steps: int, limits: EvaluateSpec | None) -> int | None:
    """The step whose checkpoint ends the run: ``total_steps``, or an earlier one at which the looks ended it.

    None while training is not over. A checkpoint that is damaged ended nothing: its steps are to be trained again.
    """
    done = committed_steps(store, run_id)
    if done and done[0] >= total_steps:
        return total_steps
    if limits is None or limits.patience is None:
        return None
    _, newest = next(manifests(store, run_id), (None, None))
    if isinstance(newest, Manifest) and Looks.of_extra(newest.state.extra).ended_early:
        return newest.state.step
    return None


class InRunEvaluation:
    """One rank's share of each look.

    All ranks run the same number of forward passes, as ZeRO-3 gathers parameters in each: rows that are missing at the
    end are padded with ones of zero weight.
    """

    def __init__(
        self, limits: EvaluateSpec, task: Task, reader: TokenReader, split: BatchSplit, *, rank: int, engine: Engine
    ) -> None:
        self.limits = limits
        self._task, self._reader, self._engine = task, reader, engine
        self._rows, self._rank, self._world_size = split.micro_rows, rank, split.world_size
        self._num_samples = min(reader.num_samples, limits.max_samples or reader.num_samples)

    def is_due(self, step: int, *, total_steps: int) -> bool:
        """Whether there is a look after ``step``; that after step 0 shows what training starts from."""
        return step % self.limits.every_steps == 0 or step == total_steps

    def loss(self, progress: Callable[[], None]) -> float:
        """Nats per target over the samples, on all ranks alike; NaN where there is no target. Collective.

        Args:
            progress: called before each pass.
        """
        module = self._engine.module
        sums = torch.zeros(2, dtype=torch.float64)
        module.eval()
        try:
            # No inference_mode: ZeRO-3 keeps what it gathers for the next step, which then could not be trained.
            with torch.no_grad():
                for first in range(0, self._num_samples, self._rows * self._world_size):
                    progress()
                    sums += torch.tensor(self._pass(module, first + self._rank * self._rows), dtype=torch.float64)
        finally:
            module.train()
        progress()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1]) if sums[1] > 0 else float("nan")

    def _pass(self, module: torch.nn.Module, first: int) -> tuple[float, float]:
        """Sum of losses and number of targets of this rank's rows from ``first`` on."""
        mine = np.arange(first, min(first + self._rows, self._num_samples), dtype=np.int64)
        padded = np.concatenate([mine, np.zeros(self._rows - len(mine), dtype=np.int64)])
        samples = Samples(rows=self._reader.rows(padded), num_real=len(mine), row_rng=partial(row_rng, first))
        batch = self._task.collate(samples)
        on_device = {name: tensor.to(self._engine.device) for name, tensor in batch.items()}
        return float(self._task.loss_sum(module, on_device)), float(self._task.num_targets(batch))


def open_evaluation(
    spec: RunSpec,
    store: Store,
    manifest: DatasetManifest,
    task: Task,
    split: BatchSplit,
    *,
    rank: int,
    engine: Engine,
) -> InRunEvaluation | None:
    """This rank's part in the looks; None where the run file asks for none.

    Raises:
        RunError: the held-out split has no sample. IntegrityError, StoreError: its shards cannot be had.
    """
    limits = spec.train.evaluate
    if limits is None:
        return None
    reader = TokenReader(store, manifest, manifest.eval, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=1, what="held-out")
    return InRunEvaluation(limits, task, reader, split, rank=rank, engine=engine)
