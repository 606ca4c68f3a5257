"""Light ranks: processes that run the real save and resume on plain tensors of which every value is known.

They come from a forkserver that has imported torch already, so that one which was killed is replaced in 0.1 s.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.catalog import Folder, read_manifest
from orchestrator.checkpoint.format import KINDS
from orchestrator.checkpoint.reader import CheckpointReader, buffer_piece, frozen_pieces, pieces_of
from orchestrator.checkpoint.resume import resume_newest
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.checkpoint.tensors import byte_view
from orchestrator.errors import HeadwayError
from orchestrator.store import Store, WorkerGroup
from orchestrator.store.s3 import Patience, new_client
from orchestrator.targets import processes
from tests.unit.checkpoint.saving import FROZEN, RUN, SHAPES, fill_frozen, frozen_values
from tests.unit.checkpoint.states import FakeState, scalars

KEEP = 2
SMALL_TABLE, LARGE_TABLE = 100_000, 17 * 2**20
"""Bytes of the buffer in rank 0's file: less than one part of a multipart upload, and more."""
ANSWER_TIMEOUT_S = 300.0
_PERIOD = 65521  # prime, so that no block is like another
_MAX_WARNINGS = 1000


# -- the values of a step


def parameter_values(step: int) -> dict[str, dict[str, Tensor]]:
    """Per parameter and kind, all its elements: each a function of the step and its place. Pure."""
    irrational = (0.6180339887, 0.7548776662, 0.4142135623)
    return {
        name: {
            kind: torch.frac(
                torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * irrational[0]
                + step * irrational[1]
                + (3 * place + number) * irrational[2]
            ).float()
            for number, kind in enumerate(KINDS)
        }
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def table_values(step: int, num_bytes: int) -> Tensor:
    """The buffer's bytes at a step. Pure."""
    period = (torch.arange(_PERIOD, dtype=torch.int32) * 40503 // 64 + step).to(torch.uint8)
    return period.repeat(-(-num_bytes // _PERIOD))[:num_bytes]


class Table(nn.Module):
    """A module with one persistent buffer, and no parameter."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(num_bytes, dtype=torch.uint8))


class KnownState:
    """What one of ``world_size`` ranks holds: a cut of the parameters, and all of the buffer."""

    def __init__(self, *, rank: int, world_size: int, table_bytes: int) -> None:
        self.tensors = FakeState(SHAPES, frozen_shapes=FROZEN, rank=rank, world_size=world_size)
        self.module = Table(table_bytes)

    def fill(self, step: int) -> None:
        """Train: the values of ``step``."""
        self.tensors.fill(parameter_values(step))
        fill_frozen(self.tensors, frozen_values())
        self.module.table.copy_(table_values(step, self.module.table.numel()))

    def num_wrong(self, step: int) -> int:
        """Elements that are not those of ``step``."""
        full, frozen = parameter_values(step), frozen_values()
        pairs = [
            (f.tensors[kind], full[f.parameter][kind][f.start : f.start + f.length])
            for f in self.tensors.fragments()
            for kind in KINDS
        ]
        pairs += [(f.tensors["frozen"], frozen[f.parameter]) for f in self.tensors.frozen()]
        pairs.append((self.module.table, table_values(step, self.module.table.numel())))
        return sum(int((found != expected).sum()) for found, expected in pairs)


def num_wrong_in_store(store: Store, folder: Folder) -> int:
    """Elements of a committed checkpoint, read whole, that are not those of its step.

    Raises:
        IntegrityError, NotFound: it is damaged.
    """
    manifest, _ = read_manifest(store, folder)
    known = KnownState(rank=0, world_size=1, table_bytes=manifest.buffers["table"].size_bytes)
    pieces = [buffer_piece(manifest.buffers["table"], byte_view(known.module.table))]
    for f in known.tensors.fragments():
        for kind in KINDS:
            pieces += pieces_of(manifest, f.parameter, kind, 0, byte_view(f.tensors[kind]))
    for f in known.tensors.frozen():
        pieces += frozen_pieces(manifest, f.parameter, 0, byte_view(f.tensors["frozen"]))
    CheckpointReader(store, folder, manifest).read(pieces)
    return known.num_wrong(manifest.state.step)


# -- the processes


@dataclass(frozen=True, kw_only=True)
class Place:
    """How a process comes to the store: through the proxy, or past it."""

    bucket: str
    prefix: str
    settings: dict[str, str]
    """AWS_… variables."""
    patience: Patience

    def open(self) -> Store:
        return Store(self.bucket, self.prefix, client=new_client(self.patience, self.settings))


@dataclass(frozen=True, kw_only=True)
class Role:
    """Which part of which group of workers a process plays."""

    group: WorkerGroup
    rank: int
    world_size: int
    table_bytes: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a resume or a save came to on one rank."""

    step: int | None = None
    num_wrong: int = 0
    error: str = ""
    """The exception's class and message; empty where it went well."""
    warnings: tuple[str, ...] = ()
    """What a resume said on its way."""


class Rank:
    """One process, and the pipe to it."""

    def __init__(self, place: Place, role: Role) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place, role), daemon=True)
        self.process.start()
        theirs.close()

    def resume(self) -> Answer:
        """Load the newest checkpoint, as this rank's part of a group."""
        self._connection.send(("resume", 0))
        return self.answer()

    def begin_save(self, step: int) -> None:
        """Train up to ``step`` and save it; :meth:`answer` tells what became of that."""
        self._connection.send(("save", step))

    def save(self, step: int) -> Answer:
        self.begin_save(step)
        return self.answer()

    def has_ended(self) -> bool:
        """Whether an answer is there, or the process has ended."""
        return self._connection.poll(0)

    def answer(self) -> Answer:
        """
        Raises:
            TimeoutError: none came. EOFError: the process has ended.
        """
        if not self._connection.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"a rank gave no answer in {ANSWER_TIMEOUT_S:.0f} s")
        found: Answer = self._connection.recv()
        return found

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Returns when it has stopped."""
        self._signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        stopped = lambda: stat.read_text().rpartition(")")[2].split()[0] in "TZ"  # noqa: E731
        assert processes.wait_until(stopped, timeout_s=ANSWER_TIMEOUT_S, ended=lambda: False)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()  # also ends one that is frozen
        self.process.join()
        self._connection.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)


def _serve(connection: Connection, place: Place, role: Role) -> None:
    torch.set_num_threads(1)
    store = place.open()
    known = KnownState(rank=role.rank, world_size=role.world_size, table_bytes=role.table_bytes)
    writer = CheckpointWriter(
        store, role.group, known.tensors, known.module,  # type: ignore[arg-type]
        rank=role.rank, world_size=role.world_size, keep=KEEP, retry_s=0.2,
    )  # fmt: skip
    work: dict[str, Any] = {
        "resume": lambda _: _resume(store, known),
        "save": lambda step: _save(writer, known, step),
    }
    while True:
        try:
            name, step = connection.recv()
        except EOFError:
            return
        connection.send(work[name](step))


def _resume(store: Store, known: KnownState) -> Answer:
    """Without a collective among the ranks, each makes rank 0's choice for itself."""
    heard = BufferingHandler(_MAX_WARNINGS)
    logging.getLogger("orchestrator").addHandler(heard)
    try:
        found = resume_newest(store, RUN, known.tensors, known.module, rank=0)  # type: ignore[arg-type]
    except HeadwayError as e:
        return Answer(error=f"{type(e).__name__}: {e}")
    finally:
        logging.getLogger("orchestrator").removeHandler(heard)
    said = tuple(record.getMessage() for record in heard.buffer)
    return Answer(step=found.step, num_wrong=known.num_wrong(found.step), warnings=said) if found else Answer()


def _save(writer: CheckpointWriter, known: KnownState, step: int) -> Answer:
    known.fill(step)
    writer.save(scalars(step))
    saved = writer.wait()
    assert saved is not None
    return Answer(step=step, error=f"{type(saved.error).__name__}: {saved.error}" if saved.error else "")
