"""How long a rank waited for its batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.plan import split_batch
from workloads.feed import BatchFeed

TAKES_S = 0.2


class SlowTask:
    """Builds a batch once it may, or after a while."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.takes_s = TAKES_S

    def collate(self, _: Any) -> dict[str, torch.Tensor]:
        self.may.wait(self.takes_s)
        return {}


@pytest.fixture
def task() -> SlowTask:
    return SlowTask()


@pytest.fixture
def feed(task: Any) -> Iterator[BatchFeed]:
    reader: Any = SimpleNamespace(rows=lambda _, allocate: {}, close=lambda: None)
    split = split_batch(4, 1, 4)
    feed = BatchFeed(task, reader, lambda _: np.arange(4), split, rank=0, seed=0, device=torch.device("cpu"))
    yield feed
    feed.close()


def test_waits_add_up_until_they_are_asked_for(feed: BatchFeed) -> None:
    feed.take(0)
    feed.take(1)
    assert feed.waited_s() >= 2 * TAKES_S * 0.9
    assert feed.waited_s() == 0.0


def test_what_was_built_meanwhile_is_not_waited_for(feed: BatchFeed, task: SlowTask) -> None:
    task.takes_s = 10.0
    task.may.set()
    feed.prefetch(0)
    feed._ahead[0].result()
    task.may.clear()  # what is built from now on takes its time
    feed.take(0)
    assert feed.waited_s() < task.takes_s / 2
