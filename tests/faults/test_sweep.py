"""Faults at every kind of request of a save or a resume: nothing is ever torn, lost, wrong or overwritten, and what a
second try puts right is saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IS_FULL
from tests.faults.report import HEADINGS, table, write_results
from tests.faults.scenarios import QUICK, all_scenarios, must_be_saved
from tests.faults.sweep import LATEST, Result, Scenario, inject, not_ended
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
def test_no_fault_harms_a_checkpoint(scenario: Scenario, yard: Yard, results: list[Result]) -> None:
    print(f"Again: make test-faults SEED={SEED} ONLY={scenario.name}")
    try:
        result = inject(scenario, yard)
    except Exception as e:
        results.append(not_ended(scenario, e))
        raise
    print(result)
    results.append(result)
    assert result.verdict == Verdict()
    assert result.struck
    assert result.saved == "committed" or not must_be_saved(scenario)
    if scenario.strikes_resume:
        assert result.resumed_step == (LATEST - 1 if scenario.falls_back else LATEST)
        passed_over = f"The checkpoint of step {LATEST} cannot be used"
        assert any(passed_over in warning for warning in result.warnings) == scenario.falls_back


def test_an_injection_that_did_not_end_is_in_the_table(tmp_path: Path) -> None:
    write_results(tmp_path / "found", SEED, [not_ended(ALL[0], TimeoutError("no answer"))])
    row = table(json.loads((tmp_path / "found").read_text())["injections"]).splitlines()[-1]
    figures = dict(zip(HEADINGS, (cell.strip(" *") for cell in row.strip("|").split("|")), strict=True))
    assert {name for name, figure in figures.items() if figure == "1"} == {"injections", "did not end"}


def test_the_sweep_covers_what_it_should() -> None:
    names = [scenario.name for scenario in ALL]
    assert len(set(names)) == len(names) >= 100
    assert set(QUICK) < set(names)
    quick = {scenario.kind.partition(":")[0] for scenario in ALL if scenario.name in QUICK}
    assert quick >= {"kill -9", "SIGSTOP", "resume"}
    assert sum(must_be_saved(scenario) for scenario in ALL) >= 100
    assert all_scenarios(SEED) == ALL != all_scenarios(SEED + 1)
