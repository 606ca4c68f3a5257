"""The order of samples: each epoch visits all once, each step is a pure function, the same at any world size."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.order import BLOCK_TOKENS, MAX_STREAMS, OPEN_BLOCKS, SampleOrder
from orchestrator.plan import split_batch

SIZES = st.integers(1, 3000)
BATCHES = st.integers(1, 50)
SEEDS = st.integers(0, 2**63 - 1)
LENGTHS = st.sampled_from([1, 256, BLOCK_TOKENS // 5, BLOCK_TOKENS])
FINGERPRINT = "0123456789abcdef"
PAGE = Path(__file__).parents[3] / "docs" / "sample-order.md"


def order(
    num_samples: int, batch_size: int = 8, *, seed: int = 0, fingerprint: str = FINGERPRINT, length: int = 256
) -> SampleOrder:
    return SampleOrder(
        fingerprint=fingerprint,
        seed=seed,
        num_samples=num_samples,
        global_batch_size=batch_size,
        sequence_length=length,
    )


@given(num_samples=SIZES, batch_size=BATCHES, seed=SEEDS, epoch=st.integers(0, 2**40), length=LENGTHS)
def test_an_epoch_visits_each_sample_once(
    num_samples: int, batch_size: int, seed: int, epoch: int, length: int
) -> None:
    found = order(num_samples, batch_size, seed=seed, length=length).at(np.arange(num_samples), epoch)
    assert sorted(found) == list(range(num_samples))


@given(num_samples=SIZES, batch_size=BATCHES, seed=SEEDS, num_epochs=st.integers(1, 3), length=LENGTHS)
def test_steps_visit_each_sample_once_an_epoch(
    num_samples: int, batch_size: int, seed: int, num_epochs: int, length: int
) -> None:
    samples = order(num_samples, batch_size, seed=seed, length=length)
    num_steps = num_epochs * num_samples // batch_size
    seen = np.concatenate([[], *(samples.batch(step) for step in range(num_steps))]).astype(int)
    times = np.bincount(seen, minlength=num_samples)
    rest = num_epochs * num_samples - num_steps * batch_size  # not seen yet, of the last epoch
    assert times.max(initial=0) <= num_epochs
    assert num_epochs * num_samples - times.sum() == rest
    assert times.min() >= num_epochs - 1 - rest // num_samples


@given(num_samples=SIZES, batch_size=BATCHES, steps=st.permutations(range(12)), length=LENGTHS)
def test_a_step_does_not_depend_on_those_before(
    num_samples: int, batch_size: int, steps: list[int], length: int
) -> None:
    in_turn = order(num_samples, batch_size, length=length).batches(range(12)).tolist()
    for step in steps:
        assert order(num_samples, batch_size, length=length).batch(step).tolist() == in_turn[step]


@given(num_samples=SIZES, global_batch_size=st.integers(8, 64), step=st.integers(0, 10_000), length=LENGTHS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_ranks_together_compute_the_global_batch(
    world_size: int, num_samples: int, global_batch_size: int, step: int, length: int
) -> None:
    split = split_batch(global_batch_size, world_size, micro_batch_size=3)
    samples = order(num_samples, global_batch_size, length=length)
    shares = [samples.batches(range(step, step + 3), split.rows_of(rank)) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares, axis=1), samples.batches(range(step, step + 3)))


@given(blocks=st.integers(4, 2500), batch_size=st.sampled_from([8, 32, 96]), step=st.integers(0, 1000))
def test_a_rank_needs_few_places_at_a_time(blocks: int, batch_size: int, step: int) -> None:
    """The rows of one stream come out of one window of blocks, or of two where one ends and the next begins."""
    num_samples = 256 * MAX_STREAMS * blocks  # whole blocks, and as many for each stream
    samples = order(num_samples, batch_size, length=BLOCK_TOKENS // 256)
    assert samples.block_samples == 256
    step %= num_samples // batch_size - 40
    found = samples.batches(range(step, step + 40), range(batch_size // samples.num_streams))
    assert len(set((found // 256).ravel().tolist())) <= 2 * OPEN_BLOCKS // samples.num_streams


def test_where_blocks_are_not_whole_few_samples_come_from_elsewhere() -> None:
    samples = order(10**6 + 77, 32, length=BLOCK_TOKENS // 256)
    found = samples.batches(range(1000, 1040), range(1))
    assert len(set((found // 256).ravel().tolist())) <= 2 * OPEN_BLOCKS // samples.num_streams + 2


def test_it_differs_by_epoch_seed_and_fingerprint() -> None:
    first = order(1000).at(np.arange(1000), 0).tolist()
    others = [
        order(1000).at(np.arange(1000), 1).tolist(),
        order(1000, seed=1).at(np.arange(1000), 0).tolist(),
        order(1000, fingerprint="fedcba9876543210").at(np.arange(1000), 0).tolist(),
    ]
    for other in [*others, list(range(1000))]:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 20


def test_neighbours_are_scattered() -> None:
    """A shuffle that moved samples in runs would show as steps of one."""
    found = order(4096, 1).at(np.arange(4096), 0)
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.01
    assert abs(np.corrcoef(np.arange(4096), found)[0, 1]) < 0.1


def test_every_place_is_as_likely_as_another() -> None:
    """Over many epochs, where one sample stands is spread evenly; chi-squared of 63 degrees is above 120 in 1e-5."""
    samples = order(640, 16)
    seen = np.zeros(64)
    for epoch in range(2000):
        place = int(np.flatnonzero(samples.at(np.arange(640), epoch) == 5)[0])
        seen[place // 10] += 1
    expected = seen.sum() / 64
    assert float(((seen - expected) ** 2 / expected).sum()) < 120


def test_a_billion_samples_cost_no_memory_and_little_time() -> None:
    samples = order(10**9, 256, length=2048)
    samples.batch(0)
    took_us = []
    for start in range(0, 3_900_000, 300_000):
        began_s = time.perf_counter()
        samples.batches(range(start, start + 16))
        took_us.append((time.perf_counter() - began_s) * 1e6 / (16 * 256))
    tracemalloc.start()
    try:
        samples.batches(range(1_000_000, 1_000_016))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"a sample of 10^9 takes {statistics.median(took_us):.2f} us, and a call {peak_bytes / 1e6:.2f} MB")
    assert statistics.median(took_us) <= 10
    assert peak_bytes < 4e6


def test_the_order_of_a_run_never_changes() -> None:
    """The examples of docs/sample-order.md, and the first is here as well: neither may change alone."""
    assert order(1000, 8, seed=7).batch(0).tolist() == [122, 168, 827, 989, 953, 87, 275, 332]
    examples = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(examples) == 5
    for line in examples:
        num_samples, batch_size, seed, length, step, rows = (cell.strip() for cell in line.strip("|").split("|"))
        samples = order(int(num_samples), int(batch_size), seed=int(seed), length=int(length))
        assert samples.batch(int(step))[:8].tolist() == [int(row) for row in rows.split()], line


def by_the_page(samples: SampleOrder, position: int, epoch: int) -> int:
    """The sample at a position, computed one step after the other as docs/sample-order.md says."""
    num, batch, length = samples.num_samples, samples.global_batch_size, samples.sequence_length
    streams = max(power for power in (1, 2, 4, 8, 16, 32, 64) if batch % power == 0)
    block = max(1, min(2**22 // length, num // (4 * streams)))
    stream_blocks = math.ceil(math.ceil(Fraction(num, block)) / Fraction(streams))
    digest = hashlib.sha512(f"{samples.fingerprint}/{samples.seed}/{epoch}".encode()).digest()
    keys = [int.from_bytes(digest[8 * word : 8 * word + 8], "little") for word in range(8)]

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    def permuted(value: int, own: list[int], size: int) -> int:
        bits = max(2, (size - 1).bit_length())
        widths = (-(-bits // 2), bits // 2)
        while True:
            left, right = value >> widths[1], value % 2 ** widths[1]
            for number, key in enumerate(own):
                left, right = right, left ^ mix(right ^ key) % 2 ** widths[number % 2]
            value = (left << widths[1]) | right
            if value < size:
                return value

    def place(at: int) -> int:
        nth, stream = divmod(at, streams)
        window, within = divmod(nth, 64 // streams * block)
        own = [mix(key ^ mix(window * streams + stream)) for key in keys[:4]]
        size = min(64 // streams, stream_blocks - 64 // streams * window) * block
        nth = window * (64 // streams) * block + permuted(within, own, size)
        slot = nth // block * streams + stream
        return permuted(slot, keys[4:], streams * stream_blocks) * block + nth % block

    position = place(position)
    while position >= num:
        position = place(position)
    return position


@given(num_samples=st.integers(1, 10**12), batch_size=BATCHES, seed=SEEDS, length=LENGTHS, data=st.data())
def test_it_is_what_the_page_says(
    num_samples: int, batch_size: int, seed: int, length: int, data: st.DataObject
) -> None:
    samples = order(num_samples, batch_size, seed=seed, length=length)
    position, epoch = data.draw(st.integers(0, num_samples - 1)), data.draw(st.integers(0, 100))
    assert int(samples.at(np.array([position]), epoch)[0]) == by_the_page(samples, position, epoch)
