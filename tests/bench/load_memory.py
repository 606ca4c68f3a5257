"""Host memory that each of two ranks takes to load pretrained weights at ZeRO-3, beside the load that comes to mind.

The naive load is transformers' ``from_pretrained`` on every rank, and then ``deepspeed.initialize``, which cuts the
model. Headway builds the model without its weights, cuts it, and has each rank read its own part from the store. The
model is random, of SmolLM2-135M's shape, in bf16 as that is; both end with equal weights, which is checked.

Each case has processes of its own. Memory is what is resident beyond what was before the model: ``peak`` is Linux's
VmHWM, set back (``/proc/self/clear_refs``) once all is imported and a first tiny engine was made; ``held`` is what is
there after the load, when what was freed has been given back; ``partition`` is what ZeRO-3 leaves to a rank of weights,
gradients, masters and moments, by arithmetic.

    make bench NAME=load_memory
    python -m tests.bench.load_memory --cases fp32,fp32-lora
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator.checkpoint.resume import load_base
from orchestrator.memory import Precision
from orchestrator.plan import split_batch
from orchestrator.pretrained.source import list_base
from orchestrator.spec import RunSpec, TrainSpec, ZeroSpec, parse
from orchestrator.store import Store, open_store
from tests.bench.harness import at_most, bench_ranks, finish, say
from tests.bench.server import s3_store
from tests.integration.pretrained_ranks import dataset_of
from tests.tiny_model import END_OF_TEXT, make_tokenizer
from workloads.engine import Engine, build_cpu_op
from workloads.fetch_base import fetch_base
from workloads.pretrained_model import origin_of
from workloads.tasks import task_of
from workloads.tasks.base_context import base_context

WORLD_SIZE = 2
MAX_SHARE = 0.2
"""Of the model, above what a rank holds in the end, and above its partition."""
CASES = ("fp32", "fp32-lora", "bf16", "bf16-lora")
NUM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LORA = {"rank": 16, "alpha": 32.0}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One rank's memory in bytes, and a sum over the model's weights that tells them apart."""

    peak_bytes: int
    held_bytes: int
    partition_bytes: int
    """Of weights, gradients, masters and moments, without DeepSpeed's buffers."""
    seconds: float
    checksum: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load_memory")
    parser.add_argument("--cases", default=",".join(CASES), help="precision, and -lora where an adapter is trained")
    args = parser.parse_args()
    build_cpu_op()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        directory = Path(folder) / "model"
        num_parameters = save_model(directory)
        say(f"{num_parameters / 1e6:.0f} M parameters are saved")
        dataset_of(store, directory)
        fingerprint = fetch_base(list_base(str(directory), store), store).fingerprint
        for case in args.cases.split(","):
            figures[case] = measure(store, case, directory, fingerprint, num_parameters)
    finish("load_memory", {"parameters": num_parameters, "cases": figures}, targets_of(figures))


def save_model(directory: Path) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token=END_OF_TEXT).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(store: Store, case: str, directory: Path, fingerprint: str, num_parameters: int) -> dict[str, Any]:
    precision, _, lora = case.partition("-")
    spec = finetuning(directory, precision, lora=bool(lora))
    found: dict[str, list[Taken]] = {}
    with bench_ranks(WORLD_SIZE) as ranks:
        found["headway"] = ranks.run(load_headway, store.uri, spec, fingerprint)
    with bench_ranks(WORLD_SIZE) as ranks:
        found["naive"] = ranks.run(load_naive, spec)
    model_bytes = NUM_BYTES[precision] * num_parameters
    worst = {name: max(taken, key=lambda t: t.peak_bytes - t.held_bytes) for name, taken in found.items()}
    for name, taken in worst.items():
        say(f"{case}, {name}: peak {taken.peak_bytes / 1e6:.0f} MB, held {taken.held_bytes / 1e6:.0f} MB")
    return {
        "model_mb": round(model_bytes / 1e6, 1),
        "weights_equal": len({taken.checksum for taken in (*found["headway"], *found["naive"])}) == 1,
        **{
            name: {
                "peak_mb": round(taken.peak_bytes / 1e6, 1),
                "held_mb": round(taken.held_bytes / 1e6, 1),
                "partition_mb": round(taken.partition_bytes / 1e6, 1),
                "above_held_share_of_model": round((taken.peak_bytes - taken.held_bytes) / model_bytes, 3),
                "above_partition_share_of_model": round((taken.peak_bytes - taken.partition_bytes) / model_bytes, 3),
                "seconds": round(max(t.seconds for t in found[name]), 1),
            }
            for name, taken in worst.items()
        },
    }


def finetuning(directory: Path, precision: str, *, lora: bool) -> RunSpec:
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": "bench",
            "model": {"pretrained": str(directory), "lora": LORA if lora else None},
            "data": {"dataset": "tiny", "sequence_length": 16},
            "train": {"steps": 10, "global_batch_size": 2, "micro_batch_size": 1, "precision": precision,
                      "zero": {"stage": 3}},
        }
    )  # fmt: skip


# -- work for the ranks


def load_headway(store_uri: str, spec: RunSpec, fingerprint: str) -> Taken:
    from orchestrator.dataset.format import read_manifest

    store = open_store(store_uri)
    base = base_context(spec, store, fingerprint)
    assert base is not None
    task = task_of(spec, read_manifest(store, "tiny", "0123456789abcdef"), base)
    meter = Meter(spec)
    torch.manual_seed(spec.train.seed)
    model = task.build_model()
    origin = origin_of(model, base.manifest)
    engine = engine_of(model, spec.train, spec.train.precision, unfilled=origin.tensors.keys())
    load_base(store, origin, engine.state, engine.model)
    del model
    return meter.read(engine)


def load_naive(spec: RunSpec) -> Taken:
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    meter = Meter(spec)
    torch.manual_seed(spec.train.seed)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(spec.model.pretrained), dtype="float32")
    if spec.model.lora is not None:
        config = peft.LoraConfig(
            r=spec.model.lora.rank,
            lora_alpha=spec.model.lora.alpha,  # type: ignore[arg-type]
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    engine = engine_of(model, spec.train, spec.train.precision)
    del model
    return meter.read(engine)


def engine_of(model: nn.Module, train: TrainSpec, precision: str, **options: Any) -> Engine:
    chosen: Precision = precision  # type: ignore[assignment]
    split = split_batch(train.global_batch_size, WORLD_SIZE, train.micro_batch_size)
    return Engine(model, train=train, split=split, precision=chosen, device=torch.device("cpu"), **options)


class Meter:
    """What this process comes to hold from now on, everything imported and DeepSpeed's own one-time buffers made."""

    def __init__(self, spec: RunSpec) -> None:
        import peft  # noqa: F401  before the meter starts
        from transformers import LlamaConfig, LlamaForCausalLM

        tiny = LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
        train = spec.train.model_copy(update={"zero": ZeroSpec(stage=3)})
        engine_of(LlamaForCausalLM(tiny), train, spec.train.precision)
        _give_back()
        self._before, self._started = _resident("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now

    def read(self, engine: Engine) -> Taken:
        seconds = time.perf_counter() - self._started
        peak = _resident("VmHWM") - self._before
        _give_back()
        return Taken(
            peak_bytes=peak,
            held_bytes=_resident("VmRSS") - self._before,
            partition_bytes=_partition_bytes(engine),
            seconds=seconds,
            checksum=_checksum(engine),
        )


def _partition_bytes(engine: Engine) -> int:
    trained, frozen = engine.state.fragments(), engine.state.frozen()
    kept = sum(tensor.nbytes for fragment in [*trained, *frozen] for tensor in fragment.tensors.values())
    computing = 2 * NUM_BYTES[engine.precision]  # weights and gradients, beside fp32's masters and moments
    return kept + computing * sum(fragment.length for fragment in trained)


def _checksum(engine: Engine) -> float:
    """Of all weights but the adapter's, which come from torch's seed. Collective."""
    total = torch.zeros((), dtype=torch.float64)
    for fragment in [*engine.state.fragments(), *engine.state.frozen()]:
        if "lora" not in fragment.parameter:
            weights = fragment.tensors.get("fp32", fragment.tensors.get("frozen"))
            assert weights is not None
            places = torch.arange(fragment.start, fragment.start + fragment.length) % 1009
            total += (weights.double() * places).sum()
    torch.distributed.all_reduce(total)
    return round(float(total), 3)


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024


def targets_of(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pure."""
    targets = {
        f"{case}: peak above {what}, share of the model": at_most(
            found["headway"][f"above_{what}_share_of_model"], MAX_SHARE
        )
        for case, found in figures.items()
        for what in ("held", "partition")
    }
    unequal = sum(not found["weights_equal"] for found in figures.values())
    return targets | {"cases with other weights than the naive load's": at_most(unequal, 0)}


if __name__ == "__main__":
    main()
