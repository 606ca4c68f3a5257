from __future__ import annotations

import numpy as np
import pytest

from orchestrator.release.bootstrap import MIN_BLOCKS, paired_interval

TARGETS = 100


def blocks(num_blocks: int, *, shift: float, noise: float, seed: int) -> tuple[list[float], list[float], list[int]]:
    """Losses of two models on the same blocks; texts differ much more than the models do."""
    random = np.random.default_rng(seed)
    texts = random.normal(3.0, 1.0, num_blocks)
    other = texts + random.normal(shift, noise, num_blocks)
    return (other * TARGETS).tolist(), (texts * TARGETS).tolist(), [TARGETS] * num_blocks


def test_pairs_show_what_the_spread_of_the_texts_would_hide() -> None:
    mine, theirs, targets = blocks(200, shift=-0.02, noise=0.05, seed=1)
    found = paired_interval(mine, theirs, targets)
    assert found is not None
    assert found.low < found.difference < found.high < 0
    assert found.difference == pytest.approx((sum(mine) - sum(theirs)) / sum(targets))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % of 300 experiments, give or take three standard deviations of such a count."""
    covered = 0
    for seed in range(300):
        found = paired_interval(*blocks(64, shift=-0.01, noise=0.1, seed=seed))
        assert found is not None
        covered += found.low <= -0.01 <= found.high
    assert covered / 300 >= 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5 - 0.01  # percentile intervals are a little narrow


def test_noise_does_not_pass_for_better() -> None:
    """A model that is no better is found to be so in at most some 2.5 % of the experiments."""
    passed = 0
    for seed in range(300):
        found = paired_interval(*blocks(64, shift=0.0, noise=0.1, seed=seed))
        assert found is not None
        passed += found.high < 0
    assert passed / 300 <= 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5


def test_blocks_count_by_their_targets() -> None:
    mine, theirs = [100.0] + [1.0] * 9, [200.0] + [0.5] * 9
    found = paired_interval(mine, theirs, [100] + [1] * 9)
    assert found is not None
    assert found.difference == pytest.approx((-100 + 4.5) / 109)


def test_the_same_losses_give_the_same_interval() -> None:
    given = blocks(50, shift=-0.1, noise=0.3, seed=3)
    assert paired_interval(*given) == paired_interval(*given)
    large = blocks(20_000, shift=-0.1, noise=0.3, seed=4)  # drawn in several rounds
    assert paired_interval(*large) == paired_interval(*large)


def test_too_few_blocks_say_nothing() -> None:
    count = MIN_BLOCKS - 1
    assert paired_interval([1.0] * count, [2.0] * count, [1] * count) is None


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="are not the same ones"):
        paired_interval([1.0] * 9, [1.0] * 10, [1] * 9)
