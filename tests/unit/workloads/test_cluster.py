"""What is asked of Ray for the group of workers, and what is told of Ray's errors."""

from __future__ import annotations

import pytest

from orchestrator.render.ray_job import POOL_VARIABLE
from workloads.cluster import _accelerator_type, last_words


@pytest.mark.parametrize(
    ("gpu", "environ", "kind"),
    [
        (None, {}, None),
        ("any", {}, None),
        ("A100", {}, "A100"),
        ("A100", {POOL_VARIABLE: ""}, "A100"),
        ("a100-80g", {POOL_VARIABLE: "a100-80g"}, None),  # a pool's name, which Ray does not know
        (None, {POOL_VARIABLE: "cpu"}, None),
    ],
)
def test_a_kind_is_asked_for_only_where_no_pool_was_chosen(
    gpu: str | None, environ: dict[str, str], kind: str | None
) -> None:
    assert _accelerator_type(gpu, environ) == kind


OUT_OF_MEMORY = """Training failed due to controller error:
2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.1.0.7, ID: aa90a754) was \
2.92GB used / 3.00GB limit (0.971522)
OOM kill reason: Memory usage 3129982976B exceeded threshold of 3060164198B (95.0% of 3221225472B limit)
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(9b02367e): job ID=01000000, lease ID=0100, task name=x:SynchronizationActor.__init__, \
required resources={}, pid=11748, actual memory used=0.11GB, worker ID=3436)
Selected to kill: (Task: job ID=01000000, lease ID=0000, task name=share, required resources={CPU: 1}, pid=25538, \
actual memory used=0.29GB, worker ID=383c)
]
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/."""


def test_a_node_that_ran_out_of_memory_is_named_with_what_was_killed_and_what_to_set() -> None:
    told, next_step = last_words(RuntimeError(OUT_OF_MEMORY), otherwise="")
    assert told == (
        "the node 10.1.0.7 ran out of memory, 2.92 of 3.00 GB in use, so Ray killed SynchronizationActor, share."
    )
    assert "head.memory" in next_step


def test_of_any_other_error_the_last_line_is_told() -> None:
    assert last_words(RuntimeError("Traceback …\n  odd \n"), otherwise="logs") == ("odd", "logs")
    assert last_words(RuntimeError(), otherwise="logs") == ("RuntimeError", "logs")
