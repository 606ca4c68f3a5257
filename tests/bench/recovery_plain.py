"""The peer in recovery: a training loop as Ray's documentation writes it for DeepSpeed, with the same model and data.

Each rank saves its part with ``save_checkpoint`` into a folder of its own and reports it; Ray Train uploads what all
ranks report into one folder in S3. After a failure each rank fetches that folder and loads it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def train_plain(config: dict[str, Any]) -> None:
    """One worker.

    Args:
        config: ``store``, ``spec``, ``dataset`` (name and fingerprint); ``stop_file``, which ends it when it appears.
    """
    import ray.train

    from orchestrator.dataset.format import read_manifest
    from orchestrator.plan import split_batch
    from orchestrator.schedule import learning_rate
    from orchestrator.spec import RunSpec
    from orchestrator.store import open_store
    from workloads.engine import Engine
    from workloads.feed import open_feed
    from workloads.tasks import task_of

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    spec, store = RunSpec.model_validate(config["spec"]), open_store(config["store"])
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    manifest = read_manifest(store, *config["dataset"])
    task, device = task_of(spec, manifest), torch.device("cpu")
    split = split_batch(spec.train.global_batch_size, world_size, spec.train.micro_batch_size)
    feed = open_feed(spec, store, manifest, task, split, rank=rank, num_steps=spec.train.steps or 0, device=device)
    torch.manual_seed(spec.train.seed)
    engine = Engine(task.build_model(), train=spec.train, split=split, precision="fp32", device=device)
    total_steps = spec.train.steps or 0
    step = load(engine)
    while not stopping(config["stop_file"]):
        targets = 0
        for batch in feed.take(step):
            targets = total(task.num_targets(batch))
            engine.backward(task.loss_sum(engine.module, batch), global_targets=targets)
        feed.prefetch(step + 1)
        engine.step(learning_rate(spec.train.optimizer, step=step, total_steps=total_steps))
        step += 1
        if step % spec.checkpoint.every_steps == 0:
            save(engine, step)


def load(engine: Any) -> int:
    """Load the newest reported checkpoint, if there is one. Returns the steps done."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, client_state = engine.module.load_checkpoint(folder)
    return int(client_state["step"])


def save(engine: Any, step: int) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        engine.module.save_checkpoint(folder, tag="checkpoint", client_state={"step": step})
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def stopping(file: str) -> bool:
    """Whether any rank sees the file."""
    return total(Path(file).exists()) > 0


def total(value: float) -> int:
    """The sum over all ranks."""
    tensor = torch.tensor(float(value))
    dist.all_reduce(tensor)
    return int(tensor)
