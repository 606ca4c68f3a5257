"""Work on the parts of a source as Ray Data tasks, of one CPU each."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from orchestrator.store import Store, open_store
from workloads.prepare.parts import PartJob

Result = TypeVar("Result", bound=BaseModel)


def on_cluster(
    work: Callable[[PartJob, Store], Result], jobs: Sequence[PartJob], result: type[Result]
) -> Iterator[Result]:
    """What ``work`` gives of each part, as it is finished."""
    if not jobs:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"job": job.model_dump_json()} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in dataset.map(_work_row, fn_args=[work], num_cpus=1).iter_rows():
        yield result.model_validate_json(row["result"])


def _work_row(row: dict[str, Any], work: Callable[[PartJob, Store], BaseModel]) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the task has one CPU; its neighbours use the others
    job = PartJob.model_validate_json(row["job"])
    return {"result": work(job, _store(job.store)).model_dump_json()}


@functools.cache
def _store(uri: str) -> Store:
    """The store, opened once a process: a client takes longer to make than some small parts take to be tokenized."""
    return open_store(uri)
