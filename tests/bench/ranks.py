"""Gloo ranks of a benchmark: processes that run any importable function and keep their module's state between calls."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

import torch

from orchestrator.targets.ports import is_free

_ANSWER_TIMEOUT_S = 580.0


class Ranks:
    """``size`` processes that are ranks of one group, one thread each; a context manager, which ends them."""

    def __init__(self, size: int) -> None:
        port = next(port for port in range(22800, 30000) if is_free(port))
        context = multiprocessing.get_context("spawn")
        self._ranks = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, size, port))
            for rank in range(size)
        ]

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned, by rank."""
        futures = [rank.submit(work, *args) for rank in self._ranks]
        return [future.result(_ANSWER_TIMEOUT_S) for future in futures]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # a rank may wait for another for ever
            for rank in self._ranks:
                for process in (rank._processes or {}).values():
                    process.kill()
        for rank in self._ranks:
            rank.shutdown()


def _join(rank: int, size: int, port: int) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
