"""With which code ``headway run`` ends, where it is the only start of its job and where KubeRay starts it again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.commands.run import _would_go_on_elsewhere, run
from orchestrator.errors import AttemptsUsedUp, Displaced, HeadwayError, Interrupted, RunError, StoreError
from orchestrator.release.outcome import Outcome
from orchestrator.reporter import Reporter, Result
from orchestrator.starter import STARTER
from orchestrator.store.attempts import Allowance

JOB = "my-model-1a2b3c4d-00002"
ATTEMPTS = (2, 5)
KINDS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, HeadwayError)]
KINDS = [kind for kind in KINDS if kind is not HeadwayError]
FINAL = {"UsageError", "SpecError", "Fenced", "AttemptsUsedUp", "Interrupted", "RunError", "GateRefused", "EmptySource"}

Run = Callable[..., Result]


class FakePipeline:
    """Stands for ``workloads.pipeline``, which ``headway run`` finds by its name."""

    def __init__(self, comes_to: Outcome | HeadwayError) -> None:
        self.comes_to = comes_to
        self.given: dict[str, Any] = {}
        self.ended: list[bool] = []

    def run(self, _spec: Any, _store: Any, **given: Any) -> Outcome:
        self.given = given
        if isinstance(self.comes_to, HeadwayError):
            raise self.comes_to
        return self.comes_to


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with a pipeline that comes to something."""
    (tmp_path / "run.yaml").write_text(STARTER)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setitem(sys.modules, "workloads.cluster", SimpleNamespace(connect=lambda _say: JOB))  # type: ignore[arg-type]

    def call(pipeline: FakePipeline, attempts: tuple[int, int] | None) -> Result:
        monkeypatch.setitem(sys.modules, "workloads.pipeline", pipeline)  # type: ignore[arg-type]
        end = lambda: pipeline.ended.append(True)  # noqa: E731
        return run(tmp_path / "run.yaml", "s3://bucket/prefix", attempts, Reporter(), await_end=end)

    return call


def outcome(state: Any, reason: str = "", **facts: Any) -> Outcome:
    return Outcome(run_id="my-model-1a2b3c4d", state=state, reason=reason, attempt=2, facts=facts, ended_s=1.0)


# -- outcomes


@pytest.mark.parametrize("attempts", [None, ATTEMPTS])
def test_a_run_that_is_done(start: Run, attempts: tuple[int, int] | None) -> None:
    facts, text = start(FakePipeline(outcome("done", version="my-model@3")), attempts)
    assert facts["state"] == "done"
    assert text == "my-model-1a2b3c4d is done: my-model@3"


@pytest.mark.parametrize(("state", "exit_code"), [("refused", 3), ("failed", 1)])
def test_an_outcome_that_is_not_done_has_its_code_where_nothing_starts_it_again(
    start: Run, state: str, exit_code: int
) -> None:
    with pytest.raises(RunError, match=r"loss 5\.0 is above 4\.0") as caught:
        start(FakePipeline(outcome(state, "loss 5.0 is above 4.0")), None)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_an_outcome_starts_no_second_cluster(start: Run, state: str) -> None:
    facts, text = start(FakePipeline(outcome(state, "loss 5.0 is above 4.0")), ATTEMPTS)
    assert facts["state"] == state
    assert text == f"my-model-1a2b3c4d is {state}: loss 5.0 is above 4.0"


# -- errors


@pytest.mark.parametrize("kind", KINDS)
def test_which_errors_another_start_may_come_further_than(kind: type[HeadwayError]) -> None:
    assert _would_go_on_elsewhere(kind("It broke.")) is (kind.__name__ not in FINAL)


def test_every_kind_that_is_final_exists() -> None:
    assert {kind.__name__ for kind in KINDS} >= FINAL


def test_alone_an_error_ends_with_its_own_code(start: Run) -> None:
    with pytest.raises(Interrupted, match="It was stopped"):
        start(FakePipeline(Interrupted("It was stopped.")), None)


def test_where_another_start_may_come_further_it_fails(start: Run) -> None:
    pipeline = FakePipeline(StoreError("S3 is down."))
    with pytest.raises(StoreError, match="S3 is down"):
        start(pipeline, ATTEMPTS)
    assert pipeline.ended == []


def test_displaced_it_waits_for_the_end_of_its_pod_so_that_it_does_not_count_as_failed(start: Run) -> None:
    pipeline = FakePipeline(Displaced("Its pod ends."))
    with pytest.raises(Displaced, match="Its pod ends"):
        start(pipeline, ATTEMPTS)
    assert pipeline.ended == [True]


def test_where_another_start_would_not_it_ends_well_and_says_why(
    start: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(FakePipeline(AttemptsUsedUp("It broke.", next_step="Mend it.")), ATTEMPTS) == ({}, "")
    said = capsys.readouterr()
    assert said.err.endswith("headway: It broke.\n  → Mend it.\n")
    assert said.out == ""


def test_a_run_file_that_is_wrong_starts_no_second_cluster(
    start: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(STARTER.replace("steps: 200 ", "steps: 0 "))
    pipeline = FakePipeline(outcome("done"))
    assert start(pipeline, ATTEMPTS) == ({}, "")
    assert "train.steps: 0 is refused" in capsys.readouterr().err
    assert pipeline.given == {}


# -- what the pipeline is told


def test_the_pipeline_knows_which_attempts_it_may_make(start: Run) -> None:
    pipeline = FakePipeline(outcome("done"))
    start(pipeline, ATTEMPTS)
    assert pipeline.given["allowance"] == Allowance(job_id=JOB, first=2, max_attempts=5)
    assert pipeline.given["job_id"] == JOB
    start(pipeline, None)
    assert pipeline.given["allowance"] is None
