"""Checkpoints for anyone's own DeepSpeed loop::

checkpoints = Checkpointer(engine, "s3://bucket/prefix", run="my-run")
for step in range(checkpoints.resume(), num_steps):
    ...
    if (step + 1) % 100 == 0:
        checkpoints.save(step + 1)
checkpoints.close()
"""

from __future__ import annotations

import json
import os
import re
from types import TracebackType
from typing import Any

from torch import distributed as dist

from orchestrator.checkpoint.agreement import tell_all
from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.random_state import RandomState
from orchestrator.checkpoint.resume import resume_newest
from orchestrator.checkpoint.save import CheckpointWriter, SaveCounts
from orchestrator.checkpoint.zero import ZeroState
from orchestrator.errors import UsageError
from orchestrator.spec import canonical_json
from orchestrator.store import Attempt, Store, WorkerGroup, claim_attempt, claim_group, open_store
from orchestrator.store.probe import require_conditional_writes

_RUN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


class Checkpointer:
    """Saves and resumes one DeepSpeed engine. All ranks make the same calls, torch.distributed being set up.

    What comes back on :meth:`resume`: master weights, Adam's moments and step count, frozen parameters, buffers, the
    fp16 loss scale, the engine's learning-rate scheduler and step counters, each rank's random generators (where the
    number of ranks is the same), and what the loop gave to :meth:`save`.

    Args:
        engine: what ``deepspeed.initialize`` returned: any ZeRO stage, fp32, bf16 or fp16, with Adam or AdamW.
        store: an S3 address, or a :class:`Store`. Credentials follow boto3's own chain.
        run: names the checkpoints; starting again under the same name goes on from its newest one, and fences any
            process of an earlier start that is still alive.
        keep: newest checkpoints kept.

    Raises:
        UsageError: the address or the run's name is no such thing. StoreError: S3 cannot be used.
    """

    def __init__(self, engine: Any, store: str | Store, *, run: str, keep: int = 3) -> None:
        if not _RUN.fullmatch(run):
            raise UsageError(
                f"{run!r} cannot name a run.", next_step="Use at most 40 small letters, digits and inner dashes."
            )
        if getattr(engine, "has_moe_layers", False) or engine.mpu is not None:
            raise UsageError("Engines with mixture-of-experts layers or model parallelism are not supported.")
        if keep < 1:
            raise UsageError(f"keep is {keep}; at least 1 checkpoint has to be kept.")
        self._engine = engine
        self._store = open_store(store) if isinstance(store, str) else store
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._random = RandomState()
        self._state = ZeroState(engine)
        self._run = run
        self._writer = CheckpointWriter(
            self._store,
            _claim(self._store, run, rank=self._rank),
            self._state,
            engine.module,
            rank=self._rank,
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            keep=keep,
            random=self._random,
        )
        self.extra: dict[str, Any] = {}
        """What the loop gave to the :meth:`save` that was resumed from."""

    @property
    def counts(self) -> SaveCounts:
        return self._writer.counts

    def resume(self) -> int:
        """Load the newest checkpoint that verifies. Returns its step, 0 where there is none.

        Raises:
            IntegrityError: there are checkpoints, and none of them can be used. RunError: of another model.
        """
        found = resume_newest(
            self._store, self._run, self._state, self._engine.module, rank=self._rank, random=self._random
        )
        if found is None:
            return 0
        state = found.manifest.state
        if state.scheduler is not None and self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(state.scheduler)
        own = state.extra.get(_OWN, {"groups": []})  # a run's own checkpoint has none
        for name in own.keys() & _COUNTERS:
            setattr(self._engine, name, own[name])
        if len(own["groups"]) == len(self._engine.optimizer.param_groups):
            for group, settings in zip(self._engine.optimizer.param_groups, own["groups"], strict=True):
                group.update(settings)
        self.extra = {name: value for name, value in state.extra.items() if name != _OWN}
        return found.step

    def save(self, step: int, **extra: Any) -> None:
        """Snapshot now and return; upload and commit behind the loop. Waits for the save before, if it still runs.

        A save that fails is logged and counted in :attr:`counts`; training is not harmed, the next save tries again.

        Args:
            step: steps done, above that of the save before.
            extra: what :attr:`extra` shall hold after a resume, such as the data's position: JSON values.

        Raises:
            UsageError: the scheduler's state or ``extra`` is not JSON.
        """
        self._writer.take_results()  # else they would add up: here nobody records them
        scheduler = self._engine.lr_scheduler
        own = {name: int(getattr(self._engine, name)) for name in _COUNTERS}
        groups = [_settings(group) for group in self._engine.optimizer.param_groups]
        self._writer.save(
            State(
                step=step,
                precision=_precision(self._engine),
                optimizer_step=self._state.optimizer_step,
                loss_scaler=self._state.loss_scaler,
                scheduler=_json("the scheduler's state", scheduler.state_dict()) if scheduler is not None else None,
                extra=_json("what save() was given", {**extra, _OWN: {**own, "groups": groups}}),
            )
        )

    def wait(self) -> bool:
        """Wait for the save under way. Returns whether the last one succeeded on this rank; rank 0's is the commit."""
        saved = self._writer.wait()
        return saved is not None and saved.error is None

    def close(self) -> None:
        """Wait for the save under way and end its thread."""
        self.wait()
        self._writer.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close(abandon=True)


_OWN = "headway/engine"  # no keyword of save() can have this name
_COUNTERS = {"global_steps", "global_samples", "skipped_steps"}


def _claim(store: Store, run: str, *, rank: int) -> WorkerGroup:
    """Rank 0 claims an attempt of the run and its first group, and tells the others. Collective."""
    text = ""
    if rank == 0:
        require_conditional_writes(store)
        attempt = claim_attempt(store, run, facts={"host": os.uname().nodename})
        group = claim_group(store, attempt)
        text = json.dumps([attempt.number, attempt.nonce, group.number, group.nonce])
    number, nonce, group_number, group_nonce = json.loads(tell_all(text, rank=rank))
    attempt = Attempt(run_id=run, number=number, nonce=nonce)
    return WorkerGroup(attempt=attempt, number=group_number, nonce=group_nonce)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler changes in a parameter group, for the step to come."""
    return {name: group[name] for name in ("lr", "momentum", "betas") if name in group}


def _precision(engine: Any) -> Any:
    return "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"


def _json(what: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(canonical_json(value)))
    except (TypeError, ValueError) as e:
        raise UsageError(f"A checkpoint holds plain JSON, and {what} is not: {e}.") from e
