"""Checkpoints by real ranks into a real S3 server: resumed at other stages and sizes, damaged, raced, exported."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from orchestrator.checkpoint.catalog import committed_steps, find, read_manifest
from orchestrator.checkpoint.reader import CheckpointReader, pieces_of
from orchestrator.checkpoint.tensors import byte_view
from orchestrator.record import EventReader
from orchestrator.release.download import download_files
from orchestrator.store import ObjectInfo, Store, layout
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.training import (
    Groups,
    Trained,
    make_dataset,
    make_job,
    make_spec,
    probe_ids,
    run_training,
)
from workloads.export import export
from workloads.export_file import one_by_one
from workloads.tasks import task_of

TASKS = "tests.integration.training"
NEVER = 0


@pytest.fixture(scope="module")
def groups(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    with pytest.MonkeyPatch.context() as patch:  # the ranks inherit it
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        held = Groups()
        try:
            yield held
        finally:
            held.close()


def trained(
    groups: Groups, store: Store, run_id: str, *, size: int, total_steps: int, break_at: int = NEVER, **spec: object
) -> list[Trained]:
    """Train a run from where it stands, in a new attempt; each rank's result."""
    job, _ = make_job(store, make_spec(**spec), run_id, total_steps=total_steps)  # type: ignore[arg-type]
    answers = groups.of(size).run(run_training, job, break_at, NEVER)
    assert [answer.message for answer in answers] == [""] * size
    return [answer.value for answer in answers]


def weights(store: Store, run_id: str, step: int) -> dict[str, torch.Tensor]:
    """All master weights of a committed checkpoint."""
    folder = find(store, run_id, step)
    manifest, _ = read_manifest(store, folder)
    reader = CheckpointReader(store, folder, manifest)
    found = {name: torch.empty(parameter.numel) for name, parameter in manifest.parameters.items()}
    reader.read(
        piece for name, target in found.items() for piece in pieces_of(manifest, name, "fp32", 0, byte_view(target))
    )
    return found


def objects(store: Store, run_id: str) -> dict[str, ObjectInfo]:
    return {item.key: item for item in store.list(layout.run(run_id))}


def relative_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    assert found
    assert found.keys() <= expected.keys()
    return max(abs(loss - expected[step]) / expected[step] for step, loss in found.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_stage_and_size_goes_on_bitwise(store: Store, groups: Groups, stage: int) -> None:
    make_dataset(store)
    unbroken = trained(groups, store, "unbroken", size=2, stage=stage, total_steps=24)
    first = trained(groups, store, "broken", size=2, stage=stage, total_steps=24, break_at=6)
    assert (first[0].end, committed_steps(store, "broken")) == ("broken", [4])
    second = trained(groups, store, "broken", size=2, stage=stage, total_steps=24)

    assert min(second[0].losses) == 5
    assert len(second[0].losses) == 20
    assert first[0].losses | second[0].losses == unbroken[0].losses
    assert unbroken[0].losses[24] < 0.95 * unbroken[0].losses[1]
    expected, found = weights(store, "unbroken", 24), weights(store, "broken", 24)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# An Eulerian walk over the stages: each is followed by each, itself included. The sizes cover every change too,
# and every stage meets every size.
LEGS = list(
    zip(
        [0, 0, 1, 1, 2, 2, 3, 3, 0, 2, 0, 3, 1, 3, 2, 1, 0],
        [1, 2, 2, 3, 3, 1, 1, 3, 3, 2, 1, 2, 1, 3, 2, 1, 2],
        strict=True,
    )
)
LEG_STEPS = 20


def test_the_walk_covers_every_change() -> None:
    stages, sizes = zip(*LEGS, strict=True)
    assert len(set(itertools.pairwise(stages))) == 16
    assert len(set(itertools.pairwise(sizes))) == 9
    assert set(LEGS) == {(stage, size) for stage in range(4) for size in (1, 2, 3)}


def test_any_stage_and_size_resumes_at_any_other(store: Store, groups: Groups) -> None:
    make_dataset(store)
    total_steps = LEG_STEPS * len(LEGS) + 1
    expected = trained(groups, store, "unbroken", size=1, stage=0, total_steps=total_steps)[0].losses
    for leg, (stage, size) in enumerate(LEGS):
        first = leg * LEG_STEPS
        ranks = trained(
            groups, store, "walk", size=size, stage=stage, every_steps=LEG_STEPS, total_steps=total_steps,
            break_at=first + LEG_STEPS + 1,
        )  # fmt: skip
        assert list(ranks[0].losses) == list(range(first + 1, first + LEG_STEPS + 2))
        assert relative_difference(ranks[0].losses, expected) <= 1e-3, f"leg {leg}: ZeRO-{stage} on {size} ranks"
        assert all(rank.losses == ranks[0].losses for rank in ranks)


@pytest.mark.parametrize("stage", [1, 3])
def test_uneven_shares_give_the_same_training(store: Store, groups: Groups, stage: int) -> None:
    """Batch 8 over 3 ranks: 3, 3 and 2 rows, in two micro-batches of at most 2, the last ones padded."""
    make_dataset(store)
    alone = trained(groups, store, "alone", size=1, stage=0, total_steps=8)[0].losses
    three = trained(groups, store, "three", size=3, stage=stage, micro_batch_size=2, total_steps=8)[0].losses
    assert len(three) == 8
    assert relative_difference(three, alone) <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_gives_the_engines_logits(store: Store, groups: Groups, tmp_path: Path, tied: bool) -> None:
    dataset = make_dataset(store)
    spec = make_spec(task=f"{TASKS}:KeptModel", tied=tied)
    job, attempt = make_job(store, spec, "exported", total_steps=6)
    ranks = [answer.value for answer in groups.of(2).run(run_training, job, NEVER, NEVER)]
    exported = export(spec, store, attempt, task_of(spec, dataset), dataset, step=6, write_all=one_by_one)
    directory = tmp_path / "model"
    download_files(store, exported.prefix, exported.files, directory)

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, dtype="float32").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(probe_ids())).logits.numpy()
    assert np.abs(logits).max() > 0.1
    assert np.abs(logits - ranks[0].logits).max() <= 1e-4
    assert np.abs(logits - ranks[1].logits).max() <= 1e-4
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    data = (directory / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert ("lm_head.weight" in header) != tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("def x")["input_ids"]) == "def x"


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_starts_from_another_ones_weights(store: Store, groups: Groups, stage: int) -> None:
    make_dataset(store)
    source = "source-0123abcd"
    trained(groups, store, source, size=2, stage=1, total_steps=24)
    fresh = trained(groups, store, "fresh", size=2, stage=stage, total_steps=4)[0].losses
    alone = trained(groups, store, "alone", size=1, stage=2, total_steps=4, init_from=f"{source}@24")[0].losses
    warm = trained(groups, store, "warm", size=2, stage=stage, total_steps=4, init_from=f"{source}@24")[0].losses
    assert list(warm) == [1, 2, 3, 4]
    assert warm[1] < 0.9 * fresh[1]  # as far as 24 steps bring this model
    assert relative_difference(warm, alone) <= 1e-3  # the same weights, whoever reads them
    folder = find(store, "warm", 4)
    assert read_manifest(store, folder)[0].state.optimizer_step == 4
    assert not list(store.list(layout.checkpoint_pins(source, 24)))


def test_a_damaged_block_means_the_checkpoint_before(store: Store, groups: Groups) -> None:
    make_dataset(store)
    unbroken = trained(groups, store, "hurt", size=2, total_steps=12, break_at=10)[0].losses
    assert committed_steps(store, "hurt") == [8, 4]
    folder = find(store, "hurt", 8)
    key = folder.prefix + read_manifest(store, folder)[0].files[1].key
    data = bytearray(store.get(key))
    data[70_000] ^= 1
    store.upload(key, bytes(data))

    job, _ = make_job(store, make_spec(), "hurt", total_steps=12)
    answers = groups.of(3).run(run_training, job, NEVER, NEVER)
    assert [answer.message for answer in answers] == [""] * 3
    said = "\n".join(warning for answer in answers for warning in answer.warnings)
    assert "The checkpoint of step 8 cannot be used" in said
    assert f"{key}: block 1 " in said
    losses = answers[0].value.losses
    assert min(losses) == 5
    common = {step: loss for step, loss in losses.items() if step in unbroken}
    assert relative_difference(common, unbroken) <= 1e-3
    assert committed_steps(store, "hurt") == [12, 8, 4]
    for step in (12, 8, 4):  # the damaged one was replaced when its step came again
        weights(store, "hurt", step)


def test_nothing_is_trained_over_checkpoints_that_are_all_damaged(store: Store, groups: Groups) -> None:
    make_dataset(store)
    trained(groups, store, "hurt", size=2, total_steps=12, break_at=6)
    folder = find(store, "hurt", 4)
    key = folder.prefix + read_manifest(store, folder)[0].files[0].key
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.upload(key, bytes(data))
    job, _ = make_job(store, make_spec(), "hurt", total_steps=12)
    answers = groups.of(2).run(run_training, job, NEVER, NEVER)
    assert [answer.error for answer in answers] == ["IntegrityError"] * 2
    assert "None of the checkpoints" in answers[0].message


def test_a_process_that_wakes_up_late_overwrites_nothing(store: Store, groups: Groups) -> None:
    make_dataset(store)
    old, new = groups.of(2), groups.of(1)
    spec = make_spec(every_steps=2, keep=10)
    first_job, first = make_job(store, spec, "raced", total_steps=12)
    old.start(run_training, first_job, NEVER, 5)
    for process in old.processes:  # each stops itself in step 5; its save of step 4 may be anywhere
        os.waitid(os.P_PID, process.pid or 0, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    second_job, second = make_job(store, spec, "raced", total_steps=12)
    (answer,) = new.run(run_training, second_job, NEVER, NEVER)
    assert answer.value.end == "complete"
    before = objects(store, "raced")
    steps = committed_steps(store, "raced")
    assert steps == [12, 10, 8, 6, 4, 2]

    for process in old.processes:
        os.kill(process.pid or 0, signal.SIGCONT)
    zombies = old.answers()
    assert zombies[0].error == "Fenced"
    assert zombies[0].message == f"Attempt {first.number} of raced is fenced: attempt {second.number} has taken over."
    after = objects(store, "raced")
    assert {key: after.get(key) for key in before} == before
    assert committed_steps(store, "raced") == steps
    assert all(f"/{first.prefix.split('-')[0]}-" in key for key in after.keys() - before.keys())
    for step in steps:
        weights(store, "raced", step)
    kinds = [event["kind"] for event in EventReader(store, "raced", from_attempt=2).poll()]
    assert kinds.count("step") == len(answer.value.losses)


def test_a_loss_that_is_no_number_stops_the_run(store: Store, groups: Groups) -> None:
    make_dataset(store)
    spec = make_spec(task=f"{TASKS}:NanAtStepSix", every_steps=2, keep=10)
    job, _ = make_job(store, spec, "nan", total_steps=12)
    answers = groups.of(2).run(run_training, job, NEVER, NEVER)
    assert [answer.error for answer in answers] == ["NotFinite"] * 2
    assert all("at step 6." in answer.message for answer in answers)
    assert committed_steps(store, "nan") == [4, 2]
    assert not [key for key in objects(store, "nan") if "step-00000006" in key]
