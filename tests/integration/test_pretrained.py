"""Fine-tuning on real ranks and a real S3 server: as a plain loop does it, resumed anywhere, exported both ways."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.checkpoint.base import BaseUnusable
from orchestrator.checkpoint.catalog import committed_steps, find, read_manifest
from orchestrator.checkpoint.verify import verify
from orchestrator.dataset.format import read_manifest as read_dataset
from orchestrator.errors import IntegrityError, NotFound, RunError, SpecError
from orchestrator.pretrained.format import BaseManifest
from orchestrator.release.download import download_files
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, layout
from orchestrator.targets.seaweedfs import S3Server
from tests.command_line import headway
from tests.gloo_ranks import Ranks
from tests.integration.pretrained_ranks import (
    LORA,
    Tuned,
    dataset_of,
    fetch,
    finetune,
    finetuning,
    loading_excess,
    make_job,
    plain_losses,
    save_base,
    train_until_killed,
)
from tests.integration.training import make_job as make_plain_job
from tests.integration.training import make_spec, probe_ids
from workloads.adapter import download_base, is_adapter, load_adapted
from workloads.engine import build_cpu_op
from workloads.export import Export, export
from workloads.export_file import one_by_one
from workloads.pretrained_model import check
from workloads.tasks import task_of
from workloads.tasks.base_context import base_context

ANSWER_TIMEOUT_S = 300.0  # ends what hangs; on a slow machine the ranks alone take a minute to start
STEPS = 20


@pytest.fixture(scope="module")
def ranks(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    build_cpu_op()
    with pytest.MonkeyPatch.context() as patch:  # the ranks inherit it
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        held = {size: Ranks(size, first_port=24300 + 100 * size, answer_timeout_s=ANSWER_TIMEOUT_S) for size in (1, 2)}
        yield held
        for group in held.values():
            group.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("gpt2"), model_type="gpt2")


def tuned(
    ranks: Ranks, store: Store, spec: RunSpec, run_id: str, base: BaseManifest, *, steps: int, break_at: int = 0
) -> tuple[list[Tuned], Attempt]:
    """Train a run from where it stands, in a new attempt."""
    job, attempt = make_job(store, spec, run_id, base, total_steps=steps)
    return ranks.run(finetune, job, break_at), attempt


def assert_close(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert found
    assert found == pytest.approx({step: expected[step] for step in found}, rel=tolerance)


PLACES = [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 1)]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_losses_are_those_of_a_plain_loop_at_every_stage(
    store: Store, ranks: dict[int, Ranks], request: pytest.FixtureRequest, model: str, lora: dict[str, Any] | None
) -> None:
    directory: Path = request.getfixturevalue(model)
    dataset, base = dataset_of(store, directory), fetch(store, directory)
    expected = plain_losses(directory, store, dataset, finetuning(directory, lora=lora), total_steps=STEPS)
    assert expected[STEPS] < 0.97 * expected[1]
    for stage, size in PLACES if model == "llama" else [(2, 2), (3, 2)]:
        spec = finetuning(directory, lora=lora, stage=stage)
        found, _ = tuned(ranks[size], store, spec, f"like-plain-{stage}-{size}", base, steps=STEPS)
        assert len(found[0].losses) == STEPS
        assert_close(found[0].losses, expected, 1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_no_loss(
    store: Store, ranks: dict[int, Ranks], llama: Path, stage: int
) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    kept, again = (
        tuned(
            ranks[2], store, finetuning(llama, stage=stage, activation_checkpointing=on), f"recompute-{on}".lower(),
            base, steps=8,
        )[0][0].losses
        for on in (False, True)
    )  # fmt: skip
    assert abs(kept[8] - kept[1]) > 0.01
    assert_close(again, kept, 1e-5)


def test_an_adapter_resumes_at_other_stages_and_sizes(store: Store, ranks: dict[int, Ranks], llama: Path) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    spec = finetuning(llama, every_steps=4)
    unbroken = tuned(ranks[2], store, spec, "unbroken", base, steps=36)[0][0].losses
    # Each stage is saved by two ranks and read by one, at another stage, and the other way round.
    legs = [(0, 2), (3, 1), (1, 2), (2, 1), (2, 2), (1, 1), (3, 2), (0, 1), (3, 2)]
    for number, (stage, size) in enumerate(legs):
        leg = finetuning(llama, stage=stage, every_steps=4)
        last = number == len(legs) - 1
        found = tuned(
            ranks[size], store, leg, "walk", base, steps=36, break_at=0 if last else 4 * number + 6
        )[0][0].losses  # fmt: skip
        assert min(found) == 4 * number + 1
        assert_close(found, unbroken, 1e-4)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 2)), 3])
def test_an_adapter_goes_on_after_its_ranks_were_killed(
    store: Store, ranks: dict[int, Ranks], llama: Path, stage: int
) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    spec = finetuning(llama, stage=stage, every_steps=4)
    unbroken = tuned(ranks[2], store, spec, "unbroken", base, steps=12)[0][0].losses
    job, _ = make_job(store, spec, "killed", base, total_steps=12)
    with Ranks(2, first_port=24600, answer_timeout_s=ANSWER_TIMEOUT_S) as doomed, pytest.raises(BrokenProcessPool):
        doomed.run(train_until_killed, job, 4, 6)
    assert committed_steps(store, "killed") == [4]
    found = tuned(ranks[1], store, spec, "killed", base, steps=12)[0][0].losses
    assert min(found) == 5
    assert_close(found, unbroken, 1e-4)


@pytest.mark.parametrize(("stage", "size"), [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)])
def test_a_checkpoint_holds_the_adapter_alone(
    store: Store, ranks: dict[int, Ranks], llama: Path, stage: int, size: int
) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    tuned(ranks[size], store, finetuning(llama, lora={"rank": 64}, stage=stage), "small", base, steps=2)
    manifest, _ = read_manifest(store, find(store, "small", 2))
    num_trained = sum(parameter.numel for parameter in manifest.parameters.values())
    assert 12 * num_trained < manifest.size_bytes < 1.05 * 12 * num_trained  # two files' headers
    assert manifest.base == BaseReference(fingerprint=base.fingerprint, digest=base.digest)
    assert {frozen.base for frozen in manifest.frozen.values()} == set(base.tensors)
    assert sum(frozen.lora is not None for frozen in manifest.frozen.values()) == 14
    assert verify(store, find(store, "small", 2)).num_files == size


def exported(
    store: Store, spec: RunSpec, attempt: Attempt, base: BaseManifest, directory: Path, *, steps: int
) -> Export:
    dataset = read_dataset(store, "tiny", "0123456789abcdef")
    task = task_of(spec, dataset, base_context(spec, store, base.fingerprint))
    found = export(spec, store, attempt, task, dataset, step=steps, write_all=one_by_one)
    download_files(store, found.prefix, found.files, directory)
    return found


def logits_of(model: torch.nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model.eval()(input_ids=torch.from_numpy(probe_ids())).logits.numpy()
    return found


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_merged_and_unmerged_logits_agree(
    store: Store, ranks: dict[int, Ranks], tmp_path: Path, request: pytest.FixtureRequest, model: str
) -> None:
    directory: Path = request.getfixturevalue(model)
    dataset_of(store, directory)
    base = fetch(store, directory)
    spec = finetuning(directory)
    found, attempt = tuned(ranks[2], store, spec, "merged", base, steps=STEPS)
    whole = exported(store, spec, attempt, base, tmp_path / "merged", steps=STEPS)
    assert whole.base is None
    auto = transformers.AutoModelForCausalLM
    merged = logits_of(auto.from_pretrained(tmp_path / "merged", use_safetensors=True, dtype="float32"))
    untrained = logits_of(auto.from_pretrained(directory, use_safetensors=True, dtype="float32"))
    assert np.abs(merged - untrained).max() > 0.1
    assert np.abs(merged - found[0].logits).max() <= 1e-4

    alone = finetuning(directory, export="adapter")
    _, attempt = tuned(ranks[1], store, alone, "adapter", base, steps=STEPS)
    part = exported(store, alone, attempt, base, tmp_path / "adapter", steps=STEPS)
    assert part.base == BaseReference(fingerprint=base.fingerprint, digest=base.digest)
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path / "merged")
    unmerged = peft.PeftModel.from_pretrained(
        auto.from_pretrained(directory, dtype="float32"), str(tmp_path / "adapter")
    )
    assert unmerged.peft_config["default"].base_model_name_or_path == str(directory)
    assert np.abs(logits_of(unmerged) - merged).max() <= 1e-3
    fetched = download_base(store, part.base, tmp_path / "cache")
    loaded = load_adapted(tmp_path / "adapter", fetched, "AutoModelForCausalLM")
    assert np.abs(logits_of(loaded) - logits_of(unmerged)).max() <= 1e-5
    width = {"llama": "hidden_size", "gpt2": "n_embd"}[model]
    other = save_base(tmp_path / "other", model_type=model, **{width: 64})
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors is no adapter of the model in"):
        load_adapted(tmp_path / "adapter", other, "AutoModelForCausalLM")


@pytest.mark.full
def test_the_command_line_exports_either_form(
    store: Store, ranks: dict[int, Ranks], tmp_path: Path, llama: Path
) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    spec = finetuning(llama).model_copy(update={"task": "causal-lm"})
    logits = tuned(ranks[2], store, finetuning(llama), "cli", base, steps=STEPS)[0][0].logits
    facts = {"spec": spec.model_dump(mode="json"), "dataset_fingerprint": "0123456789abcdef"}
    store.create_json(layout.run_spec("cli"), {**facts, "base_fingerprint": base.fingerprint})
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings |= {"HEADWAY_STORE": store.uri, "HEADWAY_CACHE": os.environ["HEADWAY_CACHE"]}
    run = partial(headway, "export", directory=tmp_path, settings=settings, timeout_s=150.0)

    run("cli@20", "--to", "merged", "--json").assert_done()
    said = run("cli", "--to", "adapter", "--lora", "adapter", "--json").assert_done().json
    assert said["base"] == {"fingerprint": base.fingerprint, "digest": base.digest, "uri": base.uri}
    assert list(said["files"]) == ["adapter_model.safetensors"]
    assert "adapter_config.json" in said["assets"]
    auto = transformers.AutoModelForCausalLM
    unmerged = peft.PeftModel.from_pretrained(auto.from_pretrained(llama, dtype="float32"), str(tmp_path / "adapter"))
    for model in (unmerged, auto.from_pretrained(tmp_path / "merged", dtype="float32")):
        assert np.abs(logits_of(model) - logits).max() <= 1e-4
    run("cli", "--to", "other", "--lora", "half").assert_refused(2, "--lora half").assert_next_step("merged or adapter")

    tuned(ranks[1], store, finetuning(llama, lora=None), "cli-full", base, steps=1)
    run("cli-full", "--to", "other", "--lora", "adapter").assert_refused(1, "it holds none").assert_next_step("merged")
    assert not (tmp_path / "other").exists()


def test_a_full_fine_tune_is_exported_as_any_model(
    store: Store, ranks: dict[int, Ranks], tmp_path: Path, llama: Path
) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    spec = finetuning(llama, lora=None)
    found, attempt = tuned(ranks[2], store, spec, "full", base, steps=4)
    manifest, _ = read_manifest(store, find(store, "full", 4))
    assert manifest.base is None
    assert not manifest.frozen
    exported(store, spec, attempt, base, tmp_path / "model", steps=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert np.abs(logits_of(model.float()) - found[0].logits).max() <= 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_no_rank_holds_a_whole_frozen_parameter_while_it_loads(
    store: Store, ranks: dict[int, Ranks], tmp_path: Path
) -> None:
    """The embedding is nearly all of this model: whole, it alone would be half of it above a rank's share."""
    directory = save_base(tmp_path / "wide", vocab_size=700_000, hidden_size=64, head_dim=16)
    dataset_of(store, directory)
    base = fetch(store, directory)
    job, _ = make_job(store, finetuning(directory), "wide", base, total_steps=1)
    for excess, num_bytes in ranks[2].run(loading_excess, job):
        assert excess <= 0.2 * num_bytes


# -- what is refused


def test_targets_that_match_nothing_are_answered_with_those_there_are(
    store: Store, ranks: dict[int, Ranks], llama: Path
) -> None:
    dataset, base = dataset_of(store, llama), fetch(store, llama)
    spec = finetuning(llama, lora={"target_modules": ["q_proj", "query"]})
    with pytest.raises(SpecError, match=r"target_modules: query is no module of LlamaForCausalLM.*gate_proj"):
        tuned(ranks[1], store, spec, "no-such", base, steps=2)
    with pytest.raises(SpecError, match="query is no module"):  # the same before anything is started
        check(task_of(spec, dataset, base_context(spec, store, base.fingerprint)))


@pytest.mark.parametrize(
    ("target", "fault"),
    [("embed_tokens", "embed_tokens is no linear module"), ("lm_head", "lm_head shares its weight with")],
)
def test_targets_that_no_adapter_fits_are_refused(
    store: Store, ranks: dict[int, Ranks], llama: Path, target: str, fault: str
) -> None:
    dataset_of(store, llama)
    with pytest.raises(SpecError, match=fault):
        tuned(
            ranks[1], store, finetuning(llama, lora={"target_modules": [target]}), "unfit", fetch(store, llama), steps=2
        )


def test_a_base_that_lacks_weights_of_the_model_is_refused(
    store: Store, ranks: dict[int, Ranks], tmp_path: Path
) -> None:
    directory = save_base(tmp_path / "lacking")
    dataset = dataset_of(store, directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    base, spec = fetch(store, directory), finetuning(directory)
    with pytest.raises(SpecError, match=r"does not hold model\.layers\.2\."):
        tuned(ranks[1], store, spec, "lacking", base, steps=2)
    with pytest.raises(SpecError, match=r"does not hold model\.layers\.2\."):
        check(task_of(spec, dataset, base_context(spec, store, base.fingerprint)))


def test_a_damaged_base_is_one_clear_error_and_no_training(store: Store, ranks: dict[int, Ranks], llama: Path) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    key = f"{base.prefix}model.safetensors"
    weights = bytearray(store.get(key))
    weights[-100] ^= 1
    store.upload(key, bytes(weights))
    for lora in (LORA, None):
        with pytest.raises(BaseUnusable, match=rf"model\.safetensors.* block .*Delete bases/{base.fingerprint}/"):
            tuned(ranks[1], store, finetuning(llama, lora=lora), f"damaged-{lora is None}".lower(), base, steps=2)
        assert committed_steps(store, f"damaged-{lora is None}".lower()) == []
    store.delete([key])
    with pytest.raises(BaseUnusable, match=r"model\.safetensors"):
        tuned(ranks[1], store, finetuning(llama), "lost", base, steps=2)


def test_another_run_does_not_start_from_an_adapter(store: Store, ranks: dict[int, Ranks], llama: Path) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    run_id = "tuned-0a1b2c3d"
    tuned(ranks[1], store, finetuning(llama), run_id, base, steps=2)
    job, _ = make_plain_job(store, make_spec(init_from=f"{run_id}@2"), "heir", total_steps=2)
    with pytest.raises(RunError, match=rf"holds an adapter, .*headway export {run_id}@2"):
        ranks[1].run(finetune, json.dumps(job))


def test_a_base_that_is_gone_is_one_clear_error(store: Store, ranks: dict[int, Ranks], llama: Path) -> None:
    dataset_of(store, llama)
    base = fetch(store, llama)
    _, attempt = tuned(ranks[1], store, finetuning(llama), "orphan", base, steps=2)
    assert committed_steps(store, "orphan") == [2]
    spec = finetuning(llama)
    context = base_context(spec, store, base.fingerprint)
    store.delete([item.key for item in store.list(layout.base(base.fingerprint))])
    # That the pretrained weights are gone is no reason to train from the start, nor from an older checkpoint.
    with pytest.raises((BaseUnusable, NotFound), match=base.fingerprint):
        tuned(ranks[1], store, spec, "orphan", base, steps=4)
    assert committed_steps(store, "orphan") == [2]
    dataset = read_dataset(store, "tiny", "0123456789abcdef")
    with pytest.raises(BaseUnusable, match=rf"are gone: .*{base.fingerprint}"):
        export(spec, store, attempt, task_of(spec, dataset, context), dataset, step=2, write_all=one_by_one)
