"""The peer in submit: what a person writes to train with Ray Train and DeepSpeed in a RayJob, and nothing else.

A ConfigMap carries it into the head pod, and it uses nothing of Headway. The driver and rank 0 print one line of JSON
each: the times, by ``time.time()``, of points on the way to the first optimizer step.

    python bare_rayjob.py '{"architecture": …, "rows": …, "sequence_length": …, "num_workers": …, "deepspeed": …}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

STARTED_S = time.time()


def train(config: dict[str, Any]) -> None:
    """One worker: a few steps on batches that lie ready in memory."""
    import deepspeed
    import ray.train
    import torch
    import transformers

    times_s = {"worker": time.time()}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config["architecture"]), dtype="float32"
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config["deepspeed"],
        dist_init_required=False,
    )
    shape = (config["rows"], config["sequence_length"])
    batch = torch.randint(0, config["architecture"]["vocab_size"], shape)
    times_s["training"] = time.time()
    for step in range(3):
        engine.backward(engine(input_ids=batch, labels=batch, use_cache=False).loss)
        engine.step()
        if step == 0:
            times_s["step"] = time.time()
    if ray.train.get_context().get_world_rank() == 0:
        print(json.dumps({"times_s": times_s}), flush=True)


def main() -> None:
    import ray.train
    import ray.train.torch

    config = json.loads(sys.argv[1])
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=config,
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=config["num_workers"], resources_per_worker={"CPU": 1}),
    )
    print(json.dumps({"times_s": {"driver": STARTED_S, "fit": time.time()}}), flush=True)
    trainer.fit()


if __name__ == "__main__":
    main()
