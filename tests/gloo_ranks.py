"""Gloo ranks: processes that run any importable function and keep their module's state between calls."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

import torch

from orchestrator.targets.ports import is_free


class Ranks:
    """``size`` processes that are ranks of one group, one thread each. Its end kills them, hung or not.

    Args:
        first_port: where the search for a free one begins; each user has a range of its own.
        answer_timeout_s: how long one call may take.
    """

    def __init__(self, size: int, *, first_port: int, answer_timeout_s: float) -> None:
        self._answer_timeout_s = answer_timeout_s
        port = next(port for port in range(first_port, 30000) if is_free(port))
        context = multiprocessing.get_context("spawn")
        self._ranks = [
            ProcessPoolExecutor(1, mp_context=context, initializer=join_group, initargs=(rank, size, port))
            for rank in range(size)
        ]

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned, by rank."""
        futures = [rank.submit(work, *args) for rank in self._ranks]
        return [future.result(self._answer_timeout_s) for future in futures]

    def close(self) -> None:
        for rank in self._ranks:
            for process in (rank._processes or {}).values():
                process.kill()  # it may wait for another for ever, and Python's exit for it
        for rank in self._ranks:
            rank.shutdown()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def join_group(rank: int, size: int, port: int) -> None:
    """Make this process a rank, with one thread."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
