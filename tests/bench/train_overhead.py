"""Tokens per second of a run's steady state over a bare DeepSpeed loop of the same model, batch and processes.

Both run in the same Ray Train workers: Headway's own training loop, with its data reading, events, metrics, stop
checks and loss all-reduce; and, every few steps, a block of a plain loop on a second engine with the same DeepSpeed
config, whose batches lie ready in memory and which looks at nothing. So both see the same noise of the machine.

    make bench NAME=train_overhead
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.commands.demo import RUN_FILE, upload_corpus
from orchestrator.commands.stack import options
from orchestrator.reporter import Reporter
from orchestrator.runs import identify
from orchestrator.spec import RunSpec, parse
from orchestrator.store import claim_attempt, open_store
from orchestrator.targets import local
from tests.bench.harness import at_least, finish, spread

NUM_BLOCKS = 16
WARM_UP_BLOCKS = 1
TARGET = 0.97
MODELS = {
    # The run file of docs/run-file.md: a step of about a second.
    "example": {
        "architecture": {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "sequence_length": 256,
        "global_batch_size": 16,
        "block_steps": 5,
    },
    # The demo's: a step of about a tenth of a second, where a fixed cost a step weighs ten times as much.
    "demo": {"architecture": {}, "sequence_length": 128, "global_batch_size": 8, "block_steps": 20},
}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        directory = Path(folder) / ".headway"
        try:
            stack = local.up(directory, options(dashboard_port=18265, serve_port=18000), print)
            stack.apply_to(os.environ)
            figures = {name: measure(spec_of(name), MODELS[name]["block_steps"]) for name in MODELS}
        finally:
            local.down(directory, print)
    targets = {f"{name} tokens/s over bare": at_least(figures[name]["ratio"]["median"], TARGET) for name in MODELS}
    finish("train_overhead", figures, targets)


def spec_of(name: str) -> RunSpec:
    """The demo's run file with this model's sizes, long enough for all blocks and without checkpoints between."""
    import yaml

    model = MODELS[name]
    document = yaml.safe_load(RUN_FILE.replace("SOURCE", "s3://headway/main/demo/stdlib/**/*.py"))
    document["name"] = f"bench-{name}"
    document["model"]["architecture"] |= model["architecture"]
    document["data"]["sequence_length"] = model["sequence_length"]
    steps = model["block_steps"] * (NUM_BLOCKS + WARM_UP_BLOCKS)
    document["train"] |= {"steps": steps, "global_batch_size": model["global_batch_size"]}
    document["checkpoint"]["every_steps"] = steps
    del document["release"], document["gate"]
    return parse(document)


def measure(spec: RunSpec, block_steps: int) -> dict[str, Any]:
    """Run one model's interleaved blocks in Ray Train workers."""
    import ray
    import ray.train
    import ray.train.torch

    from workloads.prepare import prepare
    from workloads.train import TrainJob

    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
    store = open_store()
    source = upload_corpus(store, Reporter())
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"train": source})})
    identity = identify(spec, store, Path.cwd())
    dataset = prepare(spec.data, spec.name, list(identity.files), store)
    attempt = claim_attempt(store, identity.run_id, facts={"job": "bench"})
    job = TrainJob(
        store=store.uri,
        spec=spec,
        run_id=identity.run_id,
        attempt=attempt.number,
        attempt_nonce=attempt.nonce,
        dataset=(dataset.name, dataset.fingerprint),
        total_steps=spec.train.steps or 0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "blocks.json"
        ray.train.torch.TorchTrainer(
            interleaved,
            train_loop_config={"job": job.model_dump(mode="json"), "block_steps": block_steps, "out": str(out)},
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name=spec.name, storage_path=scratch),
        ).fit()
        blocks = json.loads(out.read_text())[WARM_UP_BLOCKS:]
    ray.shutdown()
    tokens = spec.train.global_batch_size * spec.data.sequence_length * block_steps
    return {
        "headway_tokens_per_s": spread([tokens / headway for headway, _ in blocks]),
        "bare_tokens_per_s": spread([tokens / bare for _, bare in blocks]),
        "ratio": spread([bare / headway for headway, bare in blocks]),
        "step_ms": round(1000 * statistics.median(headway for headway, _ in blocks) / block_steps, 1),
    }


def interleaved(config: dict[str, Any]) -> None:
    """One worker: Headway's loop, and after each block of its steps as many of the bare loop's."""
    import ray.train

    from workloads.metrics import TrainMetrics
    from workloads.train import TrainJob, train

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    job = TrainJob.model_validate(config["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    bare = BareLoop(job, rank=rank, world_size=world_size)
    blocks: list[tuple[float, float]] = []
    metrics = TrainMetrics(job.run_id) if rank == 0 else lambda *_: None
    clock = {"started": 0.0}

    def on_event(kind: str, figures: Mapping[str, Any]) -> None:
        metrics(kind, figures)
        if kind == "step" and figures["step"] % config["block_steps"] == 0:
            headway_s = time.perf_counter() - clock["started"]
            blocks.append((headway_s, bare.block(config["block_steps"])))
            clock["started"] = time.perf_counter()

    clock["started"] = time.perf_counter()
    train(job, rank=rank, world_size=world_size, device=torch.device("cpu"), on_event=on_event)
    if rank == 0:
        Path(config["out"]).write_text(json.dumps(blocks))


class BareLoop:
    """What a person would write: DeepSpeed's engine, the model's own loss, batches that lie ready."""

    def __init__(self, job: Any, *, rank: int, world_size: int) -> None:
        import deepspeed

        from orchestrator.dataset.format import read_manifest
        from orchestrator.plan import split_batch
        from workloads.deepspeed_config import deepspeed_config
        from workloads.engine import parameter_groups
        from workloads.tasks import task_of

        train = job.spec.train
        split = split_batch(train.global_batch_size, world_size, train.micro_batch_size)
        torch.manual_seed(train.seed)
        model = task_of(job.spec, read_manifest(open_store(job.store), *job.dataset)).build_model()
        num_trainable = sum(p.numel() for p in model.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, weight_decay=train.optimizer.weight_decay),
            config=deepspeed_config(
                train, split, precision="fp32", device=torch.device("cpu"), num_trainable=num_trainable
            ),
            dist_init_required=False,
        )
        generator = torch.Generator().manual_seed(rank)
        shape = (split.micro_rows, job.spec.data.sequence_length)
        self.batches = [torch.randint(0, 2048, shape, generator=generator) for _ in range(8)]
        self.accumulation = split.accumulation

    def block(self, steps: int) -> float:
        """Seconds of ``steps`` optimizer steps."""
        started = time.perf_counter()
        for step in range(steps * self.accumulation):
            batch = self.batches[step % len(self.batches)]
            loss = self.engine(input_ids=batch, labels=batch, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
        torch.distributed.barrier()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
