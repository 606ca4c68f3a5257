"""The training loop of one rank: steps, looks at the held-out split, and checkpoints between them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import distributed as dist

from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.save import CheckpointWriter, Saved
from orchestrator.errors import Fenced, RunError
from orchestrator.schedule import learning_rate
from orchestrator.spec import RunSpec
from workloads.engine import Engine
from workloads.feed import BatchFeed
from workloads.in_run_evaluation import InRunEvaluation, Looks
from workloads.observer import Observer
from workloads.pulse import Pulse
from workloads.tasks import Batch, Task

End = Literal["complete", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop of one rank."""

    spec: RunSpec
    total_steps: int
    dataset_fingerprint: str
    rank: int
    task: Task
    engine: Engine
    batches: BatchFeed
    evaluation: InRunEvaluation | None
    writer: CheckpointWriter
    observer: Observer
    pulse: Pulse

    def run(self, resumed: State | None) -> End:
        """Train to the last step, or to where the looks at the held-out split end it.

        One small all-reduce a step carries all that ranks must agree on.

        Args:
            resumed: the scalars of the checkpoint that training goes on from; None starts it.
        """
        total_steps, first_step = self.total_steps, resumed.step if resumed else 0
        looks = Looks.of_extra(resumed.extra) if resumed else Looks()
        if looks.ended_early:
            return self._complete(first_step)
        looks = self._look(first_step, looks)  # a checkpoint made in haste has not waited for its own
        if looks.ended_early:
            self.writer.save(self._scalars(first_step, resumed.loss if resumed else None, looks), urgent=True)
            return self._complete(first_step)
        num_saved_notices = 0.0
        self.pulse.at(first_step + 1, "waiting for data")
        micro_batches = self.batches.take(first_step)
        self.pulse.at(first_step + 1, "agreeing")
        (targets,) = _sum_over_ranks(self._count(micro_batches))
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            self.batches.prefetch(step + 1)
            rate = learning_rate(self.spec.train.optimizer, step=step, total_steps=total_steps)
            loss_sum, grad_norm = self._compute(step, micro_batches, targets, rate)
            self.pulse.at(step + 1, "waiting for data")
            micro_batches = self.batches.take(step + 1)
            self.pulse.at(step + 1, "agreeing")
            loss_sum, next_targets, stops, num_notices, *waits_s = _sum_over_ranks(
                loss_sum,
                self._count(micro_batches),
                self.observer.stop_wanted,
                self.observer.num_notices,
                *self._wait_by_rank(),
            )
            loss, targets = loss_sum / max(targets, 1.0), next_targets
            require_finite(loss, grad_norm, step=step + 1)
            elapsed_s = time.perf_counter() - started
            self._report(step + 1, loss, rate, grad_norm, step_s=elapsed_s, data_wait_s=max(waits_s))
            stopping, preempted, num_saved_notices = stops > 0, num_notices > num_saved_notices, num_notices
            looks, is_over = self.settle(step + 1, loss, looks, stopping=stopping, preempted=preempted)
            if is_over:
                return self._complete(step + 1)
            if stopping:
                saved = self._finish(step + 1, "stopped")
                if saved is not None and isinstance(saved.error, Fenced):
                    raise saved.error  # another failure leaves the next attempt what is committed already
                return "stopped"
        return self._complete(total_steps)

    def _compute(self, step: int, micro_batches: list[Batch], targets: float, rate: float) -> tuple[float, float]:
        """One optimizer step. Returns this rank's sum of losses and the global gradient norm."""
        torch.manual_seed(_step_seed(self.spec.train.seed, step, self.rank))
        loss_sum = torch.zeros((), device=self.engine.device)
        for batch in micro_batches:
            self.pulse.at(step + 1, "forward")
            loss = self.task.loss_sum(self.engine.module, batch)
            loss_sum += loss.detach()
            self.pulse.at(step + 1, "backward")
            self.engine.backward(loss, global_targets=max(1, int(targets)))
        return float(loss_sum), self.engine.step(rate)

    def _look(self, step: int, looks: Looks) -> Looks:
        """A look at the held-out split after ``step``, where one is due that has not been made. Collective."""
        evaluation = self.evaluation
        if evaluation is None or looks.at_step == step or not evaluation.is_due(step, total_steps=self.total_steps):
            return looks
        started = time.perf_counter()
        loss = evaluation.loss(lambda: self.pulse.at(step + 1, "evaluating"))
        looks = looks.after(loss, step=step, limits=evaluation.limits)
        figures = {"step": step, "eval_loss": loss, "eval_s": time.perf_counter() - started}
        self.observer.look(figures, best_loss=looks.best_loss, ended_early=looks.ended_early)
        return looks

    def settle(self, step: int, loss: float, looks: Looks, *, stopping: bool, preempted: bool) -> tuple[Looks, bool]:
        """Look and save, each where it is due. Returns the looks so far, and whether the saved step is the last.

        Workers that are about to be taken away save first: whoever resumes there makes up for the look. Where the
        preempted group trains on and that look ends training, it ends a step later, since this one is saved.
        """
        in_haste = stopping or preempted
        if not in_haste:
            looks = self._look(step, looks)
        is_last = step == self.total_steps or looks.ended_early
        if is_last or in_haste or step % self.spec.checkpoint.every_steps == 0:
            self.pulse.at(step, "saving")
            self.writer.save(self._scalars(step, loss, looks), urgent=is_last or in_haste)
        self.observer.saves(self.writer)
        return (looks if stopping or is_last else self._look(step, looks)), is_last

    def _report(
        self, step: int, loss: float, rate: float, grad_norm: float, *, step_s: float, data_wait_s: float
    ) -> None:
        self.observer.step(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens": step * self.tokens_per_step,
                "tokens_per_s": self.tokens_per_step / step_s,
                "step_s": step_s,
                "data_wait_s": data_wait_s,
                # Rank 0's: no rank waits longer, since rank 0 waits for the parts of all before it saves again.
                "save_s": self.observer.blocked_s(self.writer),
            }
        )

    def _complete(self, step: int) -> End:
        """The end of training at ``step``, whose save has to be good."""
        saved = self._finish(step, "complete")
        if saved is not None and saved.error is not None:
            raise saved.error
        return "complete"

    def _finish(self, step: int, end: End) -> Saved | None:
        """Wait for the last save and tell what became of it."""
        self.pulse.at(step, "saving")
        started = time.perf_counter()
        saved = self.writer.wait()
        self.observer.saves(self.writer)
        save_s = time.perf_counter() - started + self.observer.blocked_s(self.writer)
        state = "failed" if saved is not None and saved.error is not None else end
        read = self.batches.counts()
        self.observer.note("training_done", step=step, state=state, save_s=round(save_s, 3), read=read)
        return saved

    def _scalars(self, step: int, loss: float | None, looks: Looks) -> State:
        return State(
            step=step,
            tokens=step * self.tokens_per_step,
            loss=loss,
            precision=self.engine.precision,
            optimizer_step=self.engine.state.optimizer_step,
            loss_scaler=self.engine.state.loss_scaler,
            spec_sha256=self.spec.sha256(),
            dataset_fingerprint=self.dataset_fingerprint,
            extra={} if self.evaluation is None else looks.as_extra(),
        )

    @property
    def tokens_per_step(self) -> int:
        return self.spec.train.global_batch_size * self.spec.data.sequence_length

    def _wait_by_rank(self) -> list[float]:
        """How long this rank waited for its data, at its own place among zeros: summed over the ranks, all waits."""
        waits_s = [0.0] * dist.get_world_size()
        waits_s[self.rank] = self.batches.waited_s()
        return waits_s

    def _count(self, micro_batches: list[Batch]) -> float:
        return float(sum(self.task.num_targets(batch) for batch in micro_batches))


class NotFinite(RunError):
    """Raised by all ranks at the same step, since they share the loss and the norm."""


def require_finite(loss: float, grad_norm: float, *, step: int) -> None:
    """
    Raises:
        NotFinite: the step's loss or gradient is NaN or infinite; going on would only save broken weights.
    """
    if not math.isfinite(loss + grad_norm):
        raise NotFinite(
            f"The loss became {loss} and the gradient norm {grad_norm} at step {step}.",
            next_step="Lower train.optimizer.learning_rate, add warmup_steps, or look at the data of that step.",
        )


def _sum_over_ranks(*values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """One seed per (run, step, rank), so that no random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
