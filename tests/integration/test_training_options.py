"""What a run file may set besides: recomputed activations, looks at the held-out split, settings of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.catalog import committed_steps, find, read_manifest
from orchestrator.record import EventReader
from orchestrator.release.download import download_files
from orchestrator.schedule import learning_rate
from orchestrator.spec import EvaluateSpec, OptimizerSpec, RunSpec
from orchestrator.store import Store
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.training import Groups, Trained, make_dataset, make_job, make_spec, run_training
from workloads.evaluate import summed
from workloads.export import export
from workloads.export_file import one_by_one
from workloads.in_run_evaluation import Looks, last_step
from workloads.tasks import task_of

STAGES = [*(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 2)), 3]
NEVER = 0
NUM_LOOKED_AT = 13
"""Held-out samples: neither a multiple of a micro-batch nor of the ranks, so that some rows only pad."""


@pytest.fixture(scope="module")
def groups(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    with pytest.MonkeyPatch.context() as patch:  # the ranks inherit it
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        held = Groups()
        try:
            yield held
        finally:
            held.close()


def spec_with(*, stage: int, every_steps: int = 100, micro_batch_size: int = 4, **train: Any) -> RunSpec:
    spec = make_spec(stage=stage, every_steps=every_steps, micro_batch_size=micro_batch_size)
    return spec.model_copy(update={"train": spec.train.model_copy(update=train)})


def trained(
    groups: Groups, store: Store, run_id: str, spec: RunSpec, *, total_steps: int, size: int = 2, break_at: int = NEVER
) -> Trained:
    """Train from where the run stands, in a new attempt; what rank 0 saw."""
    job, _ = make_job(store, spec, run_id, total_steps=total_steps)
    answers = groups.of(size).run(run_training, job, break_at, NEVER)
    assert [answer.message for answer in answers] == [""] * size
    value: Trained = answers[0].value
    return value


def steps_of(store: Store, run_id: str) -> dict[int, dict[str, Any]]:
    """What was noted of each step."""
    return {e["step"]: e for e in EventReader(store, run_id).poll() if e["kind"] == "step"}


def looks_of(store: Store, run_id: str) -> dict[int, float]:
    """Held-out losses by step."""
    return {e["step"]: e["eval_loss"] for e in EventReader(store, run_id).poll() if e["kind"] == "look"}


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_change_no_loss(groups: Groups, store: Store, stage: int) -> None:
    make_dataset(store)
    kept = trained(groups, store, "kept", spec_with(stage=stage), total_steps=5)
    again = trained(groups, store, "again", spec_with(stage=stage, activation_checkpointing=True), total_steps=5)
    assert list(kept.losses) == [1, 2, 3, 4, 5]
    assert again.losses == pytest.approx(kept.losses, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_looks_leave_training_as_it_is(groups: Groups, store: Store, stage: int) -> None:
    make_dataset(store)
    evaluate = EvaluateSpec(every_steps=2, max_samples=NUM_LOOKED_AT)
    blind = trained(groups, store, "blind", spec_with(stage=stage), total_steps=5)
    looking = trained(groups, store, "looking", spec_with(stage=stage, evaluate=evaluate), total_steps=5)
    assert looking.losses == blind.losses
    found = looks_of(store, "looking")
    assert list(found) == [0, 2, 4, 5]
    assert found[5] < found[0]


def test_a_look_sees_what_the_evaluation_of_the_exported_model_sees(
    groups: Groups, store: Store, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    dataset = make_dataset(store)
    evaluate = EvaluateSpec(every_steps=3, max_samples=NUM_LOOKED_AT)
    spec = spec_with(stage=3, evaluate=evaluate)
    spec = spec.model_copy(update={"gate": spec.gate.model_copy(update={"max_eval_samples": NUM_LOOKED_AT})})
    trained(groups, store, "seen", spec, total_steps=3)
    _, attempt = make_job(store, spec, "seen", total_steps=3)
    task = task_of(spec, dataset)
    exported = export(spec, store, attempt, task, dataset, step=3, write_all=one_by_one)
    download_files(store, exported.prefix, exported.files, tmp_path / "model")
    model = task.load_model(tmp_path / "model").eval()
    device = torch.device("cpu")
    batches = list(summed(spec, task, model, dataset, store, share=0, num_shares=1, device=device))
    targets = sum(batch.num_targets for batch in batches)
    assert targets == NUM_LOOKED_AT * spec.data.sequence_length
    assert looks_of(store, "seen")[3] == pytest.approx(sum(batch.sums["loss"] for batch in batches) / targets, abs=2e-6)


def test_looks_are_alike_at_any_size_and_stage(groups: Groups, store: Store) -> None:
    make_dataset(store)
    evaluate = EvaluateSpec(every_steps=2, max_samples=NUM_LOOKED_AT)
    trained(groups, store, "alone", spec_with(stage=0, evaluate=evaluate), total_steps=4, size=1)
    trained(groups, store, "two", spec_with(stage=3, evaluate=evaluate, micro_batch_size=3), total_steps=4)
    assert looks_of(store, "two") == pytest.approx(looks_of(store, "alone"), abs=1e-4)
    assert looks_of(store, "two")[0] == pytest.approx(looks_of(store, "alone")[0], abs=2e-6)


UNREACHABLE = EvaluateSpec(every_steps=2, max_samples=NUM_LOOKED_AT, patience=2, min_improvement=100.0)
"""The look after step 0 stays the best, so that training ends at the second one after it."""


def test_training_ends_where_looks_no_longer_better(groups: Groups, store: Store) -> None:
    make_dataset(store)
    spec = spec_with(stage=3, evaluate=UNREACHABLE)
    found = trained(groups, store, "early", spec, total_steps=50)
    assert (found.end, list(found.losses)) == ("complete", [1, 2, 3, 4])
    assert committed_steps(store, "early") == [4]
    assert last_step(store, "early", total_steps=50, limits=UNREACHABLE) == 4
    state = read_manifest(store, find(store, "early", 4))[0].state
    looks = Looks.of_extra(state.extra)
    assert (looks.best_step, looks.at_step, looks.num_without_improvement, looks.ended_early) == (0, 4, 2, True)
    assert state.loss == pytest.approx(found.losses[4])
    again = trained(groups, store, "early", spec, total_steps=50)
    assert (again.end, again.losses) == ("complete", {})
    assert committed_steps(store, "early") == [4]


def test_a_resumed_run_ends_where_it_would_have_ended(groups: Groups, store: Store) -> None:
    make_dataset(store)
    spec = spec_with(stage=2, every_steps=1, evaluate=UNREACHABLE)
    broken = trained(groups, store, "resumed", spec, total_steps=50, break_at=4)
    assert broken.end == "broken"
    assert last_step(store, "resumed", total_steps=50, limits=UNREACHABLE) is None
    resumed = trained(groups, store, "resumed", spec, total_steps=50)
    assert (resumed.end, list(resumed.losses)[-1]) == ("complete", 4)
    assert looks_of(store, "resumed").keys() == {0, 2, 4}
    assert last_step(store, "resumed", total_steps=50, limits=UNREACHABLE) == 4


def test_looks_that_better_never_end_training(groups: Groups, store: Store) -> None:
    make_dataset(store)
    evaluate = EvaluateSpec(every_steps=1, max_samples=NUM_LOOKED_AT, patience=1)
    found = trained(groups, store, "falling", spec_with(stage=2, evaluate=evaluate), total_steps=6)
    assert (found.end, list(found.losses)) == ("complete", [1, 2, 3, 4, 5, 6])
    assert last_step(store, "falling", total_steps=6, limits=evaluate) == 6


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_settings_reach_it_and_checkpoints_hold(groups: Groups, store: Store, stage: int) -> None:
    """Small buckets and groups: more collectives and more masters for one and the same training."""
    make_dataset(store)
    settings = {
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "zero_optimization": {
            "reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "sub_group_size": 1500,
            "stage3_param_persistence_threshold": 0,
        },
    }  # fmt: skip
    plain = trained(groups, store, "plain", spec_with(stage=stage), total_steps=6)
    spec = spec_with(stage=stage, every_steps=1, deepspeed=settings)
    trained(groups, store, "ours", spec, total_steps=6, break_at=4)
    found = trained(groups, store, "ours", spec, total_steps=6)
    assert list(found.losses)[-1] == 6
    assert found.losses == pytest.approx({step: plain.losses[step] for step in found.losses}, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_to_their_global_norm(groups: Groups, store: Store, stage: int) -> None:
    """Beside an eps as large as this Adam divides by nothing else, so that a step is as long as its gradient."""
    make_dataset(store)
    optimizer = OptimizerSpec(learning_rate=2.0e4, eps=1.0e6, weight_decay=0.0, schedule="constant")
    evaluate = EvaluateSpec(every_steps=1, max_samples=NUM_LOOKED_AT)

    def fall(run_id: str, max_grad_norm: float | None) -> float:
        spec = spec_with(stage=stage, optimizer=optimizer, evaluate=evaluate, max_grad_norm=max_grad_norm)
        trained(groups, store, run_id, spec, total_steps=1)
        looks = looks_of(store, run_id)
        return looks[0] - looks[1]

    whole = fall("whole", None)
    norm = steps_of(store, "whole")[1]["grad_norm"]
    assert norm > 1.1  # DeepSpeed would clip to 1.0 by itself
    assert fall("wide", 2 * norm) == pytest.approx(whole, rel=1e-3)
    assert fall("half", norm / 2) == pytest.approx(whole / 2, rel=0.05)
    assert steps_of(store, "half")[1]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # that before clipping


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_each_step_has_its_learning_rate_also_after_a_resume(groups: Groups, store: Store, schedule: Any) -> None:
    make_dataset(store)
    optimizer = OptimizerSpec(learning_rate=3.0e-3, warmup_steps=3, schedule=schedule, min_learning_rate_ratio=0.2)
    spec = spec_with(stage=2, every_steps=1, optimizer=optimizer)
    assert trained(groups, store, "rates", spec, total_steps=8, break_at=5).end == "broken"
    assert trained(groups, store, "rates", spec, total_steps=8).end == "complete"
    found = {step: event["learning_rate"] for step, event in steps_of(store, "rates").items()}
    expected = {step + 1: learning_rate(optimizer, step=step, total_steps=8) for step in range(8)}
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[1] < found[2] < found[3] < found[4]
