"""A tiny pretrained model, runs that fine-tune it on real ranks, and the same in a plain loop without DeepSpeed."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.nn import functional

from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.checkpoint.resume import load_base
from orchestrator.dataset.format import DatasetManifest, TokenizerFile, read_manifest
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader
from orchestrator.plan import split_batch
from orchestrator.pretrained.format import BaseManifest
from orchestrator.pretrained.source import list_base
from orchestrator.schedule import learning_rate
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Attempt, Store, claim_attempt, layout, open_store
from tests.integration.training import (
    GLOBAL_BATCH,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    KeptModel,
    make_dataset,
    probe_ids,
)
from tests.tiny_model import END_OF_TEXT, make_tokenizer
from workloads.engine import Engine, parameter_groups
from workloads.fetch_base import fetch_base
from workloads.pretrained_model import origin_of
from workloads.tasks import task_of
from workloads.tasks.base_context import base_context
from workloads.train import TrainJob, train

TASK = "tests.integration.training:KeptModel"
LORA = {"rank": 4, "alpha": 16.0}


def save_base(directory: Path, *, model_type: str = "llama", **changes: Any) -> Path:
    """A pretrained model: random weights in bf16, large enough that training has something to change."""
    sizes: dict[str, dict[str, Any]] = {
        "llama": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "tie_word_embeddings": True, "bos_token_id": None,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }  # fmt: skip
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        model_type, **{"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, **sizes[model_type], **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(VOCAB_SIZE), eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(directory)
    return directory


def fetch(store: Store, directory: Path) -> BaseManifest:
    return fetch_base(list_base(str(directory), store), store)


def dataset_of(store: Store, directory: Path) -> DatasetManifest:
    """The numbers of :func:`make_dataset`, as if they were prepared with the tokenizer of a pretrained model."""
    made = make_dataset(store)
    config = (directory / "tokenizer_config.json").read_bytes()
    file = TokenizerFile(size_bytes=len(config), sha256=hashlib.sha256(config).hexdigest())
    tokenizer = made.tokenizer.model_copy(update={"files": {"tokenizer_config.json": file}})
    manifest = made.model_copy(update={"tokenizer": tokenizer})
    store.create(f"{layout.dataset(made.name, made.fingerprint)}tokenizer_config.json", config)
    store.delete([layout.dataset_manifest(made.name, made.fingerprint)])
    store.create_json(layout.dataset_manifest(made.name, made.fingerprint), manifest.model_dump(mode="json"))
    return manifest


def finetuning(
    directory: Path,
    *,
    lora: dict[str, Any] | None = LORA,
    stage: int = 3,
    every_steps: int = 100,
    activation_checkpointing: bool = False,
    export: str = "merged",
) -> RunSpec:
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": "tuned",
            "task": TASK,
            "model": {"pretrained": str(directory), "lora": lora},
            "data": {"dataset": "tiny", "sequence_length": SEQUENCE_LENGTH},
            "train": {
                "steps": 1000,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": GLOBAL_BATCH,
                "optimizer": {"learning_rate": 2e-2},
                "zero": {"stage": stage},
                "precision": "fp32",
                "activation_checkpointing": activation_checkpointing,
                "seed": 7,
            },
            "checkpoint": {"every_steps": every_steps},
            "export": {"lora": export},
        }
    )


def make_job(
    store: Store,
    spec: RunSpec,
    run_id: str,
    base: BaseManifest,
    *,
    total_steps: int,
    dataset: tuple[str, str] = ("tiny", "0123456789abcdef"),
) -> tuple[str, Attempt]:
    """A job for :func:`finetune`, under a new attempt."""
    attempt = claim_attempt(store, run_id, facts={})
    job = TrainJob(
        store=store.uri,
        spec=spec,
        run_id=run_id,
        attempt=attempt.number,
        attempt_nonce=attempt.nonce,
        dataset=dataset,
        base=base.fingerprint,
        total_steps=total_steps,
    )
    return job.model_dump_json(), attempt


# -- work for the ranks


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One rank's training: losses by step, from 1, and the logits of :func:`probe_ids` after the last."""

    losses: dict[int, float]
    logits: Any = None


class Broken(Exception):
    """Raised in the middle of training, as if the process had died there."""


def finetune(job: str, break_at: int = 0) -> Tuned:
    """Train on this rank; ``break_at``: until just before that step can be saved."""
    losses: dict[int, float] = {}

    def on_step(figures: dict[str, float]) -> None:
        losses[int(figures["step"])] = figures["loss"]
        if int(figures["step"]) == break_at:
            raise Broken

    KeptModel.engines.clear()
    try:
        _train(job, on_step)
    except Broken:
        return Tuned(losses=losses)
    with torch.no_grad():  # every rank: ZeRO-3 gathers as it goes
        output = KeptModel.engines[0](input_ids=torch.from_numpy(probe_ids()), use_cache=False)
    return Tuned(losses=losses, logits=output.logits.numpy())


def losses_of(job: str) -> dict[int, float]:
    """Train on this rank. Losses by step, from 1."""
    losses: dict[int, float] = {}
    _train(job, lambda figures: losses.update({int(figures["step"]): figures["loss"]}))
    return losses


def train_until_killed(job: str, committed_step: int, last_step: int) -> None:
    """Train on this rank, and SIGKILL it at ``last_step``, once the checkpoint of an earlier step is committed."""
    parsed = TrainJob.model_validate_json(job)
    store = open_store(parsed.store)

    def on_step(figures: dict[str, float]) -> None:
        if int(figures["step"]) == last_step:
            while committed_step not in committed_steps(store, parsed.run_id):
                pass  # the test's own time-out ends it
            os.kill(os.getpid(), signal.SIGKILL)

    _train(job, on_step)


def _train(job: str, on_step: Callable[[dict[str, float]], None]) -> None:
    train(
        TrainJob.model_validate_json(job),
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        device=torch.device("cpu"),
        on_event=lambda kind, figures: on_step(dict(figures)) if kind == "step" else None,
    )


def loading_excess(job: str) -> tuple[int, int]:
    """Bytes that this rank held at the worst moment of loading beyond what it holds afterwards; bytes of the model."""
    parsed = TrainJob.model_validate_json(job)
    spec, store = parsed.spec, open_store(parsed.store)
    base = base_context(spec, store, parsed.base)
    assert base is not None
    task = task_of(spec, read_manifest(store, *parsed.dataset), base)
    split = split_batch(GLOBAL_BATCH, distributed.get_world_size(), GLOBAL_BATCH)
    _give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    model = task.build_model()
    origin = origin_of(model, base.manifest)
    num_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    engine = Engine(
        model, train=spec.train, split=split, precision="fp32", device=torch.device("cpu"), unfilled=origin.tensors
    )
    load_base(store, origin, engine.state, engine.model)
    peak = _resident("VmHWM")
    _give_memory_back()
    return peak - _resident("VmRSS"), num_bytes


def _give_memory_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


# -- the same without DeepSpeed


def plain_losses(
    directory: Path, store: Store, dataset: DatasetManifest, spec: RunSpec, *, total_steps: int
) -> dict[int, float]:
    """What transformers, and peft, give in one process: the whole batch at once, torch's AdamW."""
    model = _plain_model(directory, spec).train()
    settings = spec.train.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=settings.weight_decay), betas=settings.betas, eps=settings.eps
    )
    reader = TokenReader(store, dataset, dataset.train, sequence_length=SEQUENCE_LENGTH)
    order = SampleOrder(
        fingerprint=dataset.fingerprint,
        seed=spec.train.seed,
        num_samples=reader.num_samples,
        global_batch_size=GLOBAL_BATCH,
        sequence_length=reader.sequence_length,
    )
    losses = {}
    for step in range(total_steps):
        tokens = torch.from_numpy(reader.rows(order.batch(step))["tokens"])
        logits: Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.max_grad_norm or 0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step=step, total_steps=total_steps)
        optimizer.step()
        losses[step + 1] = float(loss.detach())
    return losses


def _plain_model(directory: Path, spec: RunSpec) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    lora = spec.model.lora
    if lora is None:
        return model
    import peft

    torch.manual_seed(spec.train.seed)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]
