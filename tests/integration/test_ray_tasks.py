"""Waiting for real Ray tasks: none goes on after an error, or once whoever waits is told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Interrupted, RunError
from workloads.cluster import own_errors
from workloads.ray_tasks import all_of, as_done, looking

pytestmark = pytest.mark.usefixtures("ray_of_two")
DEADLINE_S = 300.0


def write_on(file: Path) -> None:
    """Never ends by itself."""
    with file.open("wb", buffering=0) as opened:
        while True:
            opened.write(b"-")


def fail_after(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)
    raise RunError("this one is bad")


def number_of(number: int) -> int:
    return number


def remote(function: Callable[..., Any], *arguments: Any) -> Any:
    import ray

    return ray.remote(num_cpus=1)(function).remote(*arguments)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[list[Path]]:
    """Files that tasks write to while the test goes on, and to which they write no more once it is over."""
    files = [tmp_path / "first", tmp_path / "second"]
    yield files
    sizes = [file.stat().st_size for file in files if file.exists()]
    assert sizes
    time.sleep(1.0)
    assert [file.stat().st_size for file in files if file.exists()] == sizes


def test_after_an_error_no_task_goes_on(written: list[Path]) -> None:
    first, second = written
    with own_errors(), pytest.raises(RunError, match="this one is bad"):
        all_of([remote(write_on, first), remote(fail_after, first), remote(write_on, second)])


def test_nor_once_the_look_says_no(written: list[Path]) -> None:
    def look() -> None:
        if all(file.exists() for file in written):
            raise Interrupted("stopped in prepare")

    with looking(look), own_errors(), pytest.raises(Interrupted):
        all_of([remote(write_on, file) for file in written])


def test_nor_where_the_caller_goes_no_further(written: list[Path], tmp_path: Path) -> None:
    results = as_done([remote(number_of, 7), remote(write_on, written[0])])
    assert next(results) == 7
    deadline_s = time.monotonic() + DEADLINE_S
    while not written[0].exists():
        assert time.monotonic() < deadline_s
    results.close()


def test_results_come_in_the_tasks_order() -> None:
    assert all_of([remote(number_of, number) for number in range(6)]) == list(range(6))
