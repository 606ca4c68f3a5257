"""The kind of GPU that the group of workers asks Ray for."""

from __future__ import annotations

import pytest

from orchestrator.render.ray_job import POOL_VARIABLE
from workloads.cluster import _accelerator_type


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
