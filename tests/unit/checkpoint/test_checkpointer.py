"""Checkpoints of one's own loop, without DeepSpeed's engine: ZeRO-0 in fp32 trains with torch's own optimizer."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoint import Checkpointer
from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.checkpoint.zero import ZeroState
from orchestrator.errors import StoreError, UsageError
from tests.unit.checkpoint.saving import finish, manifest_at, new_group, writer_of
from tests.unit.checkpoint.states import scalars
from tests.unit.fakes import MemoryStore

RUN = "run-1"
BATCH = 4


class Engine:
    """What a Checkpointer asks of DeepSpeed's engine."""

    has_moe_layers = False

    def __init__(self, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.mpu: Any = None
        self.module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.lr_scheduler: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.global_steps = self.global_samples = self.skipped_steps = 0

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def counters(self) -> tuple[int, int, int]:
        return self.global_steps, self.global_samples, self.skipped_steps

    def fp16_enabled(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False

    def train(self, num_steps: int) -> list[float]:
        """The loss of each step; inputs and dropout are drawn from torch's generator."""
        losses = []
        for _ in range(num_steps):
            loss = self.module(torch.randn(BATCH, 5)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.lr_scheduler.step()
            self.global_steps += 1
            self.global_samples += BATCH
            losses.append(float(loss.detach()))
        return losses


def checkpointer(store: MemoryStore, engine: Engine, *, run: str = RUN, keep: int = 3) -> Checkpointer:
    return Checkpointer(engine, store, run=run, keep=keep)


def assert_same(found: Engine, expected: Engine) -> None:
    """In all weights and buffers."""
    values = expected.module.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in found.module.state_dict().items())


def test_a_loop_goes_on_bit_for_bit(memory_store: MemoryStore) -> None:
    engine = Engine()
    with checkpointer(memory_store, engine) as checkpoints:
        assert checkpoints.resume() == 0
        engine.train(3)
        engine.skipped_steps = 1
        checkpoints.save(3)
        at_the_save = (engine.rate, engine.counters, engine.lr_scheduler.state_dict())
        expected = engine.train(4)

    other = Engine(seed=1)
    with checkpointer(memory_store, other) as checkpoints:
        assert checkpoints.resume() == 3
        assert (other.rate, other.counters, other.lr_scheduler.state_dict()) == at_the_save
        assert (other.rate, other.counters) == (0.05, (3, 3 * BATCH, 1))
        assert other.train(4) == expected
    assert_same(other, engine)


def test_what_the_loop_gave_to_save_comes_back(memory_store: MemoryStore) -> None:
    with checkpointer(memory_store, Engine()) as checkpoints:
        assert checkpoints.extra == {}
        checkpoints.save(1, position=17, shards=["a", "b"])
    with checkpointer(memory_store, Engine()) as checkpoints:
        checkpoints.resume()
        assert checkpoints.extra == {"position": 17, "shards": ["a", "b"]}


def test_an_engine_without_a_scheduler_goes_on(memory_store: MemoryStore) -> None:
    engine = Engine()
    engine.lr_scheduler = None
    with checkpointer(memory_store, engine) as checkpoints:
        checkpoints.save(1)
    assert manifest_at(memory_store, 1)[1].state.scheduler is None
    with checkpointer(memory_store, Engine()) as checkpoints:
        assert checkpoints.resume() == 1


def test_saves_are_counted_and_the_newest_kept(memory_store: MemoryStore) -> None:
    with checkpointer(memory_store, Engine(), keep=2) as checkpoints:
        assert not checkpoints.wait()
        for step in (1, 2, 3):
            checkpoints.save(step)
        assert checkpoints.wait()
        counts = checkpoints.counts
        assert (counts.committed, counts.failed, counts.last_committed_step) == (3, 0, 3)
        assert counts.blocked_s > 0
    assert committed_steps(memory_store, RUN) == [3, 2]


def test_a_save_that_fails_is_counted_and_the_next_one_succeeds(memory_store: MemoryStore) -> None:
    with checkpointer(memory_store, Engine()) as checkpoints:
        memory_store.fail["list"] = StoreError("down")
        checkpoints.save(1)
        assert not checkpoints.wait()
        memory_store.fail.clear()
        checkpoints.save(2)
        assert checkpoints.wait()
        assert (checkpoints.counts.committed, checkpoints.counts.failed) == (1, 1)
    assert committed_steps(memory_store, RUN) == [2]


def test_a_second_start_fences_the_first(memory_store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    first = checkpointer(memory_store, Engine())
    first.save(1)
    assert first.wait()
    with checkpointer(memory_store, Engine()) as second:
        assert second.resume() == 1
        first.save(2)
        assert not first.wait()
        assert (first.counts.committed, first.counts.failed) == (1, 1)
        assert f"Attempt 1 of {RUN} is fenced: attempt 2 has taken over." in caplog.text
        first.close()
        second.save(2)
        assert second.wait()
    assert manifest_at(memory_store, 2)[1].attempt == 2


def test_the_end_of_the_block_waits_for_the_save_and_ends_its_thread(memory_store: MemoryStore) -> None:
    before = set(threading.enumerate())
    with checkpointer(memory_store, Engine()) as checkpoints:
        checkpoints.save(1)
    assert checkpoints.counts.committed == 1
    assert set(threading.enumerate()) <= before


def test_an_error_in_the_block_leaves_without_trying_again(
    memory_store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    memory_store.fail["upload_stream"] = StoreError("down")
    with pytest.raises(ZeroDivisionError):
        save_and_break(memory_store)
    assert caplog.text.count("Uploading rank 0's part of step 1 again") == 0
    assert committed_steps(memory_store, RUN) == []
    assert set(threading.enumerate()) <= before


def save_and_break(store: MemoryStore) -> None:
    with checkpointer(store, Engine()) as checkpoints:
        checkpoints.save(1)
        raise ZeroDivisionError


def test_a_runs_own_checkpoint_resumes(memory_store: MemoryStore) -> None:
    """Its loop knows nothing of an engine's counters and scheduler."""
    trained = Engine()
    trained.train(2)
    writer = writer_of(
        memory_store, new_group(memory_store, RUN), ZeroState(trained), module=trained.module  # type: ignore[arg-type]
    )  # fmt: skip
    writer.save(scalars(2))
    assert finish(writer).error is None
    engine = Engine(seed=1)
    with checkpointer(memory_store, engine) as checkpoints:
        assert checkpoints.resume() == 2
        assert (checkpoints.extra, engine.counters, engine.rate) == ({}, (0, 0, 0), 0.1)
    assert_same(engine, trained)


# -- refusals


@pytest.mark.parametrize("run", ["", "My-run", "my_run", "-run", "run-", "a/b", "r" * 41])
def test_a_bad_name_is_refused(memory_store: MemoryStore, run: str) -> None:
    with pytest.raises(UsageError, match="cannot name a run"):
        checkpointer(memory_store, Engine(), run=run)
    assert memory_store.objects == {}


def test_keeping_none_is_refused(memory_store: MemoryStore) -> None:
    with pytest.raises(UsageError, match="keep is 0"):
        checkpointer(memory_store, Engine(), keep=0)


@pytest.mark.parametrize(("name", "value"), [("has_moe_layers", True), ("mpu", object())])
def test_experts_and_model_parallelism_are_refused(memory_store: MemoryStore, name: str, value: object) -> None:
    engine = Engine()
    setattr(engine, name, value)
    with pytest.raises(UsageError, match="not supported"):
        checkpointer(memory_store, engine)


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), torch.zeros(1)])
def test_what_is_not_json_is_refused(memory_store: MemoryStore, value: object) -> None:
    with checkpointer(memory_store, Engine()) as checkpoints:
        with pytest.raises(UsageError, match=r"what save\(\) was given is not"):
            checkpoints.save(1, position=value)
        checkpoints.save(1, position=1)
    assert committed_steps(memory_store, RUN) == [1]


def test_a_scheduler_whose_state_is_not_json_is_refused(memory_store: MemoryStore) -> None:
    engine = Engine()
    engine.lr_scheduler = SimpleNamespace(state_dict=lambda: {"function": object()})
    with checkpointer(memory_store, engine) as checkpoints, pytest.raises(UsageError, match="the scheduler's state"):
        checkpoints.save(1)
    assert committed_steps(memory_store, RUN) == []
