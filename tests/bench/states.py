"""Training states of a known size and content: real ZeRO engines on gloo ranks, and their checkpoints of both kinds.

No step is trained. Every element of the masters and of Adam's moments is a number that follows from its place, so
that after a load each rank can tell whether it holds what was saved, whoever loaded it.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from orchestrator.checkpoint.format import KINDS, State
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.checkpoint.zero import OwnedFragment, ZeroState
from orchestrator.store import Store, WorkerGroup, claim_attempt, claim_group, open_store

STEP = 100
TAG = f"global_step{STEP}"
_ADAM_BYTES = 12  # a parameter's master and moments
_CHUNK = 2**18  # elements made at once, so that making them takes no memory worth mentioning


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama's sizes. ``name`` is its parameters, in millions."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocab: int = 32000


SIZES = {
    size.name: size
    for size in (
        Size(name="4", hidden=128, intermediate=352, layers=8, vocab=8000),
        Size(name="60", hidden=512, intermediate=1408, layers=8),
        Size(name="200", hidden=1024, intermediate=2816, layers=10),
        Size(name="500", hidden=1536, intermediate=4096, layers=15, vocab=24640),
    )
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a rank keeps between two pieces of work."""

    engine: Any
    state: ZeroState


_held: list[Held] = []


def held() -> Held:
    """The engine that :func:`build` made on this rank."""
    return _held[0]


# -- work for the ranks


def build(size: Size, stage: int, load_universal: bool) -> tuple[int, int]:
    """Make this rank's engine. Returns the model's parameters, and the bytes of masters and moments that this rank
    owns."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(
        model=_model(size),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "checkpoint": {"load_universal": load_universal},
        },
        dist_init_required=False,
    )
    _held[:] = [Held(engine=engine, state=ZeroState(engine))]
    state = held().state
    num_parameters = sum(torch.Size(shape).numel() for shape in state.shapes.values())
    return num_parameters, sum(_ADAM_BYTES * fragment.length for fragment in state.fragments())


def _model(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        vocab_size=size.vocab,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):  # initial values would be overwritten
        model = LlamaForCausalLM(config)
    return model.to_empty(device="cpu")  # type: ignore[no-any-return]


def fill() -> None:
    """Give every element the number of its place."""
    state = held().state
    for fragment in state.fragments():
        for kind in KINDS:
            for target, expected in _chunks(fragment, kind):
                target.copy_(expected)
    state.optimizer_step = STEP
    state.refresh()


def clear() -> None:
    """Forget what was filled in or loaded, so that a load that reads nothing is found out."""
    state = held().state
    for fragment in state.fragments():
        for kind in KINDS:
            fragment.tensors[kind].zero_()
    state.optimizer_step = 0


def matches() -> bool:
    """Whether this rank holds every number in its place, and Adam's step."""
    state = held().state
    return state.optimizer_step == STEP and all(
        torch.equal(found, expected)
        for fragment in state.fragments()
        for kind in KINDS
        for found, expected in _chunks(fragment, kind)
    )


def _chunks(fragment: OwnedFragment, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A fragment's own elements and what they should be, some at a time."""
    seed = zlib.crc32(f"{kind}/{fragment.parameter}".encode())
    for start in range(0, fragment.length, _CHUNK):
        length = min(_CHUNK, fragment.length - start)
        places = torch.arange(fragment.start + start, fragment.start + start + length)
        # Knuth's multiplicative hash: its upper bits look random, and 24 of them are exact in fp32.
        numbers = ((places + seed) * 2654435761).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
        yield fragment.tensors[kind].narrow(0, start, length), numbers.float().mul_(2.0**-24)


def save_headway(store_uri: str, group: WorkerGroup) -> None:
    """Save a checkpoint by :class:`CheckpointWriter`, and wait until it is committed."""
    writer = CheckpointWriter(
        open_store(store_uri),
        group,
        held().state,
        held().engine.module,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        keep=1,
    )
    writer.save(State(step=STEP, precision="fp32", optimizer_step=STEP))
    saved = writer.wait()
    writer.close()
    if saved is not None and saved.error is not None:
        raise saved.error


def save_deepspeed(directory: str) -> None:
    """Save DeepSpeed's own checkpoint, as :data:`TAG` in ``directory``."""
    held().engine.save_checkpoint(directory, tag=TAG)


def timed_barrier() -> float:
    """Wait for all ranks, then start a clock."""
    distributed.barrier()
    return time.perf_counter()


# -- for the benchmark's own process


def claim(store: Store, run_id: str) -> WorkerGroup:
    return claim_group(store, claim_attempt(store, run_id, facts={"job": "bench"}))
