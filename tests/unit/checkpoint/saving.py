"""What the tests of checkpoints share: groups of workers, a module with buffers, saves by several ranks, damage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.catalog import MANIFEST, Folder, find, read_manifest
from orchestrator.checkpoint.format import Manifest
from orchestrator.checkpoint.resume import Resumed, resume_newest
from orchestrator.checkpoint.save import CheckpointWriter, Saved
from orchestrator.store import Store, WorkerGroup, claim_attempt, claim_group
from tests.unit.checkpoint.states import FakeState, random_values, scalars
from tests.unit.fakes import MemoryStore

RUN = "run-1"
SHAPES: dict[str, tuple[int, ...]] = {"w": (7, 5), "bias": (3,), "scale": ()}
FROZEN: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "emb": (torch.bfloat16, (5, 3)),
    "ids": (torch.int64, (3,)),
    "none": (torch.float16, (0, 2)),
}


class Buffers(nn.Module):
    """Persistent buffers of odd sizes and several dtypes, and one that is not persistent."""

    def __init__(self, fill: int = 0) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3,), bool(fill)))
        self.register_buffer("count", torch.tensor(fill, dtype=torch.int64))
        self.register_buffer("mean", torch.full((3,), float(fill)))
        self.register_buffer("cache", torch.full((4,), float(fill)), persistent=False)
        self.inner = nn.BatchNorm1d(3, affine=False)


def new_group(store: Store, run_id: str = RUN) -> WorkerGroup:
    """The first group of a new attempt."""
    return claim_group(store, claim_attempt(store, run_id, facts={}))


def frozen_values(*, seed: int = 0) -> dict[str, Tensor]:
    """Every element of each of ``FROZEN``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (100 * torch.randn(torch.Size(shape).numel(), generator=generator)).to(dtype)
        for name, (dtype, shape) in FROZEN.items()
    }


def fill_frozen(state: FakeState, values: dict[str, Tensor]) -> None:
    for f in state.frozen():
        f.tensors["frozen"].copy_(values[f.parameter][f.start : f.start + f.length])


def writer_of(
    store: Store,
    group: WorkerGroup,
    state: FakeState,
    *,
    rank: int = 0,
    world_size: int = 1,
    keep: int = 3,
    module: nn.Module | None = None,
    **options: Any,
) -> CheckpointWriter:
    return CheckpointWriter(
        store, group, state, module or nn.Module(),  # type: ignore[arg-type]
        rank=rank, world_size=world_size, keep=keep, **options,
    )  # fmt: skip


def save(
    store: Store,
    group: WorkerGroup,
    step: int,
    *,
    values: dict[str, dict[str, Tensor]] | None = None,
    world_size: int = 2,
    keep: int = 3,
    module: nn.Module | None = None,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    frozen: dict[str, Tensor] | None = None,
    **state_options: Any,
) -> list[Exception | None]:
    """Save one checkpoint by ``world_size`` ranks; each rank's error."""
    writers = []
    for rank in range(world_size):
        frozen_shapes = FROZEN if frozen is not None else None
        state = FakeState(shapes, frozen_shapes=frozen_shapes, rank=rank, world_size=world_size, **state_options)
        state.fill(values or random_values(shapes))
        fill_frozen(state, frozen or {})
        writers.append(writer_of(store, group, state, rank=rank, world_size=world_size, keep=keep, module=module))
    for writer in writers:
        writer.save(scalars(step))
    errors = [finish(writer).error for writer in writers]
    return list(errors)


def finish(writer: CheckpointWriter) -> Saved:
    """What became of the save under way; the writer is closed."""
    saved = writer.wait()
    writer.close()
    assert saved is not None
    return saved


def load(
    store: Store,
    *,
    rank: int = 0,
    world_size: int = 1,
    module: nn.Module | None = None,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    **options: Any,
) -> tuple[FakeState, Resumed | None]:
    """One rank's state after a resume. This process takes the part of rank 0 for each."""
    state = FakeState(shapes, rank=rank, world_size=world_size, **options)
    return state, resume_newest(store, RUN, state, module or nn.Module(), rank=0)  # type: ignore[arg-type]


def resumed_step(store: Store) -> int:
    _, found = load(store)
    assert found is not None
    return found.step


def manifest_at(store: Store, step: int) -> tuple[Folder, Manifest]:
    folder = find(store, RUN, step)
    return folder, read_manifest(store, folder)[0]


def is_equal(state: FakeState, expected: FakeState) -> bool:
    """Whether two states hold the same cut and the same elements."""
    return all(
        (found.parameter, found.start, found.length) == (wanted.parameter, wanted.start, wanted.length)
        and all(torch.equal(found.tensors[kind], wanted.tensors[kind]) for kind in wanted.tensors)
        for found, wanted in zip(
            state.fragments() + state.frozen(), expected.fragments() + expected.frozen(), strict=True
        )
    )


def flip(store: MemoryStore, key: str, position: int = -1) -> None:
    """Damage one bit of an object."""
    data = bytearray(store.get(key))
    data[position] ^= 1
    store.tamper(key, bytes(data))


def leave(store: Store, group: WorkerGroup, step: int, *, name: str = "rank-00000.safetensors") -> Folder:
    """A folder of ``group`` in which the files of a save that never came to its commit lie."""
    folder = Folder(run_id=group.run_id, step=step, attempt=group.attempt.number, group=group.number, nonce=group.nonce)
    store.upload(folder.prefix + name, b"x")
    return folder


def bar_of(folder: Folder) -> str:
    return folder.prefix + MANIFEST
