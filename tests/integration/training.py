"""Real training processes for the tests: groups of gloo ranks that wait for work and stay from test to test.

A rank takes ten seconds to import what it needs, so each group is started once. A piece of work is a function of
this module and its arguments; every rank of the group runs it and answers with what it returned or raised.
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest, Shard, Split, Tokenizer
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Attempt, Store, claim_attempt, layout
from orchestrator.targets.ports import is_free
from tests.gloo_ranks import join_group
from tests.tiny_model import END_OF_TEXT, make_tokenizer
from workloads.tasks.causal_lm import CausalLM
from workloads.train import TrainJob, train

VOCAB_SIZE, SEQUENCE_LENGTH, GLOBAL_BATCH = 300, 16, 8
ANSWER_TIMEOUT_S = 300.0  # ends what hangs; on a slow machine the ranks alone take a minute to start


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank's work came to."""

    value: Any = None
    error: str = ""
    """Name of the exception's class, empty where it returned."""
    message: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one rank's training came to. ``losses`` by step, from 1."""

    end: str
    losses: dict[int, float]
    logits: Any = None


class Group:
    """``size`` processes that are ranks of one gloo group."""

    def __init__(self, size: int, *, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    def start(self, work: Callable[..., Any], *args: Any) -> None:
        for connection in self._connections:
            connection.send((work.__name__, args))

    def answers(self) -> list[Answer]:
        """Each rank's answer, by rank."""
        found = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {len(self._connections)} gave no answer in {ANSWER_TIMEOUT_S} s")
            found.append(connection.recv())
        return found

    def run(self, work: Callable[..., Any], *args: Any) -> list[Answer]:
        self.start(work, *args)
        return self.answers()

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # also ends one that is stopped
            process.join()


class Groups:
    """Groups of each size, started when they are first asked for."""

    def __init__(self) -> None:
        self._held: dict[int, Group] = {}

    def of(self, size: int) -> Group:
        if size not in self._held:
            port = next(port for port in range(20100 + 100 * size, 30000) if is_free(port))
            self._held[size] = Group(size, port=port)
        return self._held[size]

    def close(self) -> None:
        for group in self._held.values():
            group.close()


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    """A rank's main loop."""
    join_group(rank, size, port)
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(ANSWER_TIMEOUT_S / 2)  # where it hangs, if it does
        with _warnings() as said:
            try:
                answer = Answer(value=globals()[name](rank, size, *args), warnings=said)
            except Exception as e:  # the test decides what is expected
                traceback.print_exc()
                answer = Answer(error=type(e).__name__, message=str(e), warnings=said)
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Headway's own warnings while this lasts."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("orchestrator")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# -- work for the ranks


class Broken(Exception):
    """Raised in the middle of training, as if the process had died there."""


def run_training(rank: int, size: int, job: dict[str, Any], break_at: int, stop_at: int) -> Trained:
    """Train. ``break_at``: raise at that step before it can be saved; ``stop_at``: SIGSTOP oneself there."""
    import torch

    losses: dict[int, float] = {}

    def on_event(kind: str, figures: Mapping[str, Any]) -> None:
        if kind != "step":
            return
        step = int(figures["step"])
        losses[step] = figures["loss"]
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == break_at:
            raise Broken

    end = "broken"
    KeptModel.engines.clear()
    try:
        parsed = TrainJob.model_validate(job)
        end = train(parsed, rank=rank, world_size=size, device=torch.device("cpu"), on_event=on_event)
    except Broken:
        pass
    return Trained(end=end, losses=losses, logits=_logits())


def _logits() -> Any:
    """Of the engine that has just trained; all ranks take part, since ZeRO-3 gathers as it goes."""
    import torch

    if not KeptModel.engines:
        return None
    with torch.no_grad():
        return KeptModel.engines[0](input_ids=torch.from_numpy(probe_ids()), use_cache=False).logits.numpy()


def probe_ids() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(0, VOCAB_SIZE, (3, SEQUENCE_LENGTH))


class KeptModel(CausalLM):
    """Keeps the engine that trains, so that its logits can be looked at afterwards."""

    engines: list[Any] = []  # noqa: RUF012  shared on purpose, with the process's main loop

    def loss_sum(self, model: Any, batch: Any) -> Any:
        self.engines[:] = [model]
        return super().loss_sum(model, batch)


class NanAtStepSix(CausalLM):
    """A loss that becomes NaN in the sixth step, on the last rank only."""

    num_calls = 0

    def loss_sum(self, model: Any, batch: Any) -> Any:
        from torch import distributed as dist

        self.num_calls += 1
        loss = super().loss_sum(model, batch)
        last = dist.get_rank() == dist.get_world_size() - 1
        return loss * float("nan") if last and self.num_calls == 6 else loss


# -- what the tests prepare


def make_spec(
    *,
    stage: int = 3,
    every_steps: int = 4,
    keep: int = 3,
    micro_batch_size: int = GLOBAL_BATCH,
    task: str = "causal-lm",
    tied: bool = False,
    init_from: str | None = None,
) -> RunSpec:
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": "tiny",
            "task": task,
            "model": {
                "architecture": {
                    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "tie_word_embeddings": tied,
                },
                "init_from": init_from,
            },
            "data": {"dataset": "tiny", "sequence_length": SEQUENCE_LENGTH},
            "train": {
                "steps": 1000,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": micro_batch_size,
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
                "zero": {"stage": stage},
                "precision": "fp32",
            },
            "checkpoint": {"every_steps": every_steps, "keep": keep},
        }
    )  # fmt: skip


def make_dataset(store: Store) -> DatasetManifest:
    """A committed dataset of numbers that can be learned: each token mostly follows from the one before."""
    random = np.random.default_rng(0)
    tokens = np.empty(4001, dtype="<u2")
    tokens[0] = 1
    for position in range(1, len(tokens)):
        guess = (int(tokens[position - 1]) * 7 + 3) % VOCAB_SIZE
        tokens[position] = guess if random.random() < 0.9 else random.integers(0, VOCAB_SIZE)
    tokenizer = make_tokenizer(VOCAB_SIZE)
    tokenizer_json = tokenizer.to_str().encode()
    prefix = layout.dataset("tiny", "0123456789abcdef")

    def split(name: str, *pieces: np.ndarray[Any, Any]) -> Split:
        shards = []
        for number, piece in enumerate(pieces):
            shard, data = Shard.of(f"{name}-{number:05d}.bin", piece)
            store.create(prefix + shard.file, data)
            shards.append(shard)
        total = sum(shard.num_tokens for shard in shards)
        return Split(shards=tuple(shards), num_tokens=total, num_bytes=2 * total, num_files=1)

    manifest = DatasetManifest(
        name="tiny",
        fingerprint="0123456789abcdef",
        dtype="uint16",
        tokenizer=Tokenizer(
            file="tokenizer.json",
            sha256=hashlib.sha256(tokenizer_json).hexdigest(),
            size_bytes=len(tokenizer_json),
            vocab_size=VOCAB_SIZE,
            end_of_text_id=tokenizer.token_to_id(END_OF_TEXT),
        ),
        train=split("train", tokens[:1500], tokens[1500:3501]),
        eval=split("eval", tokens[3501:]),
        unigram_loss=5.7,
        source={},
        created_s=0.0,
    )
    store.create(f"{prefix}tokenizer.json", tokenizer_json)
    store.create_json(f"{prefix}manifest.json", manifest.model_dump(mode="json"))
    return manifest


def make_job(store: Store, spec: RunSpec, run_id: str, *, total_steps: int) -> tuple[dict[str, Any], Attempt]:
    """A job for :func:`run_training`, under a new attempt."""
    attempt = claim_attempt(store, run_id, facts={})
    job = TrainJob(
        store=store.uri,
        spec=spec,
        run_id=run_id,
        attempt=attempt.number,
        attempt_nonce=attempt.nonce,
        dataset=("tiny", "0123456789abcdef"),
        total_steps=total_steps,
    )
    return job.model_dump(mode="json"), attempt
