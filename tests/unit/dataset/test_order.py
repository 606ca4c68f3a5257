"""The order of samples: each epoch a permutation, each step a pure function, the same at any world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.order import SampleOrder
from orchestrator.plan import split_batch

SIZES = st.integers(1, 700)
SEEDS = st.integers(0, 2**63 - 1)
FINGERPRINT = "0123456789abcdef"


def order(num_samples: int, *, seed: int = 0, fingerprint: str = FINGERPRINT) -> SampleOrder:
    return SampleOrder(fingerprint=fingerprint, seed=seed, num_samples=num_samples)


@given(num_samples=SIZES, seed=SEEDS, epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    all_of_them = np.arange(num_samples, dtype=np.uint64)
    found = order(num_samples, seed=seed).permute(all_of_them, epoch)
    assert sorted(found) == list(range(num_samples))


@given(num_samples=SIZES, seed=SEEDS, batch_size=st.integers(1, 50), num_epochs=st.integers(1, 3))
def test_batches_concatenate_to_epochs(num_samples: int, seed: int, batch_size: int, num_epochs: int) -> None:
    samples = order(num_samples, seed=seed)
    num_steps = -(-num_epochs * num_samples // batch_size)
    stream = np.concatenate([samples.batch(step, batch_size) for step in range(num_steps)])
    all_of_them = np.arange(num_samples, dtype=np.uint64)
    for epoch in range(num_epochs):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(part, samples.permute(all_of_them, epoch))


@given(num_samples=SIZES, steps=st.permutations(range(12)))
def test_a_step_does_not_depend_on_those_before(num_samples: int, steps: list[int]) -> None:
    samples = order(num_samples)
    in_turn = {step: samples.batch(step, 7).tolist() for step in range(12)}
    assert {step: order(num_samples).batch(step, 7).tolist() for step in steps} == in_turn


@given(num_samples=SIZES, global_batch_size=st.integers(8, 40), step=st.integers(0, 10_000))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_ranks_together_compute_the_global_batch(
    world_size: int, num_samples: int, global_batch_size: int, step: int
) -> None:
    split = split_batch(global_batch_size, world_size, micro_batch_size=3)
    batch = order(num_samples).batch(step, global_batch_size)
    shares = [batch[list(split.rows_of(rank))] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), batch)


def test_it_differs_by_epoch_seed_and_fingerprint() -> None:
    samples = order(1000)
    first = samples.batch(0, 1000).tolist()
    others = [
        samples.batch(1, 1000).tolist(),
        order(1000, seed=1).batch(0, 1000).tolist(),
        order(1000, fingerprint="fedcba9876543210").batch(0, 1000).tolist(),
    ]
    for other in [*others, list(range(1000))]:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 20


def test_neighbours_are_scattered() -> None:
    """A shuffle that moved samples in runs would show as steps of one."""
    found = order(4096).batch(0, 4096)
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.01
    assert abs(np.corrcoef(np.arange(4096), found)[0, 1]) < 0.1


def test_the_order_of_a_run_never_changes() -> None:
    assert order(1000, seed=7).batch(3, 8).tolist() == [489, 872, 755, 987, 549, 363, 609, 26]
