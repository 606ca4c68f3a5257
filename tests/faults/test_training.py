"""Real training ranks whose every twentieth request fails: the losses are those of a quiet day, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.checkpoint.catalog import committed_steps, find
from orchestrator.checkpoint.verify import verify
from orchestrator.store import Store
from orchestrator.targets.seaweedfs import S3Server
from tests.faults.proxy import FaultProxy
from tests.integration.training import Groups, Trained, make_dataset, make_job, make_spec, run_training

NEVER = 0
STEPS = 16

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def between(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url, seed=3) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def groups(between: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    """Ranks whose way to the store leads through the proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("AWS_ENDPOINT_URL", between.endpoint_url)
        held = Groups()
        held.of(2)
    try:
        yield held
    finally:
        held.close()


def trained(groups: Groups, store: Store, run_id: str, *, break_at: int = NEVER) -> Trained:
    job, _ = make_job(store, make_spec(every_steps=2, keep=2), run_id, total_steps=STEPS)
    answers = groups.of(2).run(run_training, job, break_at, NEVER)
    assert [answer.message for answer in answers] == ["", ""]
    found: Trained = answers[0].value
    return found


def test_failing_requests_change_no_bit_of_the_training(store: Store, between: FaultProxy, groups: Groups) -> None:
    make_dataset(store)
    quiet = trained(groups, store, "quiet").losses
    assert list(quiet) == list(range(1, STEPS + 1))

    between.clear()
    between.failing_share, between.latency_s = 0.05, 0.01
    first = trained(groups, store, "noisy", break_at=9)
    second = trained(groups, store, "noisy")
    assert first.losses | second.losses == quiet
    assert min(second.losses) in (7, 9)  # the last save before the break may not have come to its commit
    assert sum(request.fault is not None for request in between.requests) >= 5
    for step in committed_steps(store, "noisy"):
        verify(store, find(store, "noisy", step))
    assert committed_steps(store, "noisy")[0] == STEPS
