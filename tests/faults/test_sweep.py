"""Faults at every kind of request of a save: whatever strikes, nothing is torn, lost, wrong or overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IS_FULL
from tests.faults.report import write_results
from tests.faults.scenarios import QUICK, all_scenarios
from tests.faults.sweep import Result, Scenario, inject
from tests.faults.verdict import Verdict
from tests.faults.yard import Yard

SEED = int(os.environ.get("HEADWAY_FAULTS_SEED", "1"))
ALL = all_scenarios(SEED)
CHOSEN = [scenario for scenario in ALL if IS_FULL or scenario.name in QUICK]


@pytest.fixture(scope="module")
def results() -> Iterator[list[Result]]:
    """Of this module's injections; written as JSON in the end to where HEADWAY_FAULTS_RESULTS says."""
    found: list[Result] = []
    yield found
    path = os.environ.get("HEADWAY_FAULTS_RESULTS")
    if path:
        write_results(Path(path), SEED, found)


@pytest.mark.parametrize("scenario", CHOSEN, ids=lambda scenario: scenario.name)
def test_no_fault_in_a_save_harms_a_checkpoint(scenario: Scenario, yard: Yard, results: list[Result]) -> None:
    print(f"Again: make test-faults SEED={SEED} ONLY={scenario.name}")
    result = inject(scenario, yard)
    print(result)
    results.append(result)
    assert result.verdict == Verdict()
    assert result.struck


def test_the_sweep_covers_what_it_should() -> None:
    names = [scenario.name for scenario in ALL]
    assert len(set(names)) == len(names) >= 100
    assert set(QUICK) < set(names)
    assert {scenario.kind.partition(":")[0] for scenario in ALL if scenario.name in QUICK} >= {"kill -9", "SIGSTOP"}
    assert all_scenarios(SEED) == ALL != all_scenarios(SEED + 1)
