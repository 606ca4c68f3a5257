"""Work on the parts of a source as Ray tasks, of one CPU each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel

from orchestrator.store import Store, open_store
from workloads.prepare.parts import PartJob
from workloads.ray_tasks import as_done

Result = TypeVar("Result", bound=BaseModel)


def on_cluster(work: Callable[[PartJob, Store], Result], jobs: Sequence[PartJob]) -> Iterator[Result]:
    """What ``work`` gives of each part, as it is finished.

    A part whose process or node is lost is worked on again, three times at most.

    Raises:
        ray.exceptions.RayError: the first part that failed, or whose process was lost too often.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(_work).options(name=work.__name__)  # as the dashboard counts them
    yield from as_done([task.remote(work, job) for job in jobs])


def _work(work: Callable[[PartJob, Store], Result], job: PartJob) -> Result:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the task has one CPU; its neighbours use the others
    return work(job, _store(job.store))


@functools.cache
def _store(uri: str) -> Store:
    """The store, opened once a process: a client takes longer to make than some small parts take to be tokenized."""
    return open_store(uri)
