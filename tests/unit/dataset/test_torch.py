"""The dataset in anyone's loop: the same batches to the byte at any world size, over any cut."""

from __future__ import annotations

import threading
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from orchestrator.dataset.torch import TokenDataset
from orchestrator.errors import IntegrityError, RunError, SpecError, UsageError
from orchestrator.store import layout
from tests.unit.dataset.test_reader import make
from tests.unit.fakes import MemoryStore

NAME = "text@0123456789abcdef"
LENGTH, BATCH = 8, 12
WORLD_SIZES = st.sampled_from([1, 2, 3, 4, 8])


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    store = MemoryStore(prefix="headway")
    dataset, _ = make(store, [700, 333, 568], piece_bytes=128)
    store.create_json(layout.dataset_manifest("text", dataset.fingerprint), dataset.model_dump(mode="json"))
    return store


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def opened(store: MemoryStore, cache: Path, **changes: Any) -> TokenDataset:
    arguments: dict[str, Any] = {"sequence_length": LENGTH, "batch_size": BATCH, "store": store, "cache": cache}
    return TokenDataset(NAME, **{**arguments, **changes})


def global_batches(store: MemoryStore, cache: Path, world_size: int, start: int, count: int) -> list[bytes]:
    """The batches of some steps, put together from all ranks'."""
    state = {**opened(store, cache).state_dict(), "step": start}
    ranks = []
    for rank in range(world_size):
        dataset = opened(store, cache, rank=rank, world_size=world_size)
        dataset.load_state_dict(state)
        ranks.append([batch["tokens"] for batch in islice(dataset, count)])
        assert dataset.state_dict() == {**state, "step": start + count}
    return [torch.cat(shares).numpy().tobytes() for shares in zip(*ranks, strict=True)]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(WORLD_SIZES, min_size=2, max_size=4), cuts=st.lists(st.integers(1, 25), min_size=4, max_size=4))
def test_global_batches_are_the_same_over_any_cuts_at_any_world_size(
    store: MemoryStore, cache: Path, sizes: list[int], cuts: list[int]
) -> None:
    """Two epochs of 16.6 steps each, cut into pieces, each at another size."""
    whole = global_batches(store, cache, 1, 0, sum(cuts[: len(sizes)]))
    found, step = [], 0
    for world_size, count in zip(sizes, cuts, strict=False):
        found += global_batches(store, cache, world_size, step, count)
        step += count
    assert found == whole


def test_an_epoch_holds_each_sample_once(store: MemoryStore, cache: Path) -> None:
    dataset = opened(store, cache, batch_size=8)
    rows = torch.cat([batch["tokens"] for batch in islice(dataset, 25)])  # 200 samples
    assert len({row.numpy().tobytes() for row in rows}) == 200
    assert rows.dtype == torch.int64
    assert rows.shape == (200, LENGTH + 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_loader_with_workers_gives_the_same_in_the_same_order(
    store: MemoryStore, cache: Path, num_workers: int
) -> None:
    dataset = opened(store, cache, num_steps=11)
    expected = [batch["tokens"].tolist() for batch in dataset]
    dataset.load_state_dict({**dataset.state_dict(), "step": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while threads are running
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        assert [batch["tokens"].tolist() for batch in loader] == expected[4:]


def test_pinned_or_not_a_batch_is_its_own(store: MemoryStore, cache: Path) -> None:
    first, second = islice(opened(store, cache), 2)
    kept = first["tokens"].clone()
    second["tokens"].zero_()
    assert torch.equal(first["tokens"], kept)


def test_a_caller_who_works_between_batches_gets_the_same(store: MemoryStore, cache: Path) -> None:
    """They are put together on a thread then, and here for a caller who only takes them."""
    dataset = opened(store, cache, num_steps=8)
    expected = [batch["tokens"].tolist() for batch in dataset]
    dataset.load_state_dict({**dataset.state_dict(), "step": 0})
    found = []
    for batch in dataset:
        found.append(batch["tokens"].tolist())
        assert dataset.state_dict()["step"] == len(found)
        threading.Event().wait(0.02 if len(found) % 4 else 0.0)
    assert found == expected


def test_steps_end_where_they_are_to_end(store: MemoryStore, cache: Path) -> None:
    dataset = opened(store, cache, num_steps=5)
    assert len(list(dataset)) == 5
    assert list(dataset) == []  # it goes on where it ended
    dataset.load_state_dict({**dataset.state_dict(), "step": 3})
    assert len(list(dataset)) == 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"sequence_length": 4}, "sequence_length"),
        ({"split": "eval"}, "split"),
    ],
)
def test_a_state_of_another_order_is_refused(
    store: MemoryStore, cache: Path, change: dict[str, Any], name: str
) -> None:
    state = opened(store, cache).state_dict()
    with pytest.raises(UsageError, match=name):
        opened(store, cache, **change).load_state_dict(state)
    with pytest.raises(UsageError, match="no state of a TokenDataset"):
        opened(store, cache).load_state_dict({"step": 3})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"split": "test"}, UsageError, "'test' is none of train, eval"),
        ({"batch_size": 0}, UsageError, "at least 1"),
        ({"batch_size": 3, "rank": 0, "world_size": 4}, UsageError, "a row for each of 4 ranks"),
        ({"rank": 2, "world_size": 2}, UsageError, r"not in 0 … 1"),
        ({"rank": 0}, UsageError, "give both, or none"),
        ({"batch_size": 300}, RunError, "holds 200 samples"),
        ({"dataset": "other"}, SpecError, "no prepared dataset 'other'"),
    ],
)
def test_arguments_that_make_no_sense(
    store: MemoryStore, cache: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {"dataset": NAME, "sequence_length": LENGTH, "batch_size": BATCH, "store": store, "cache": cache}
    with pytest.raises(error, match=words):
        TokenDataset(**{**arguments, **change})


def test_a_manifest_of_another_version_is_named(store: MemoryStore, cache: Path) -> None:
    store.create_json(layout.dataset_manifest("old", "f" * 16), {"format": "headway/dataset/1", "name": "old"})
    for name in ("old", "old@" + "f" * 16):
        with pytest.raises(IntegrityError, match=r"'headway/dataset/1'; this version of Headway reads"):
            TokenDataset(name, sequence_length=LENGTH, batch_size=BATCH, store=store, cache=cache)


def test_a_shard_that_is_damaged_ends_the_loop(cache: Path) -> None:
    store = MemoryStore(prefix="headway")
    dataset, tokens = make(store, [700], piece_bytes=128)
    store.create_json(layout.dataset_manifest("text", dataset.fingerprint), dataset.model_dump(mode="json"))
    key = layout.dataset("text", dataset.fingerprint) + "train-00000.bin"
    store.tamper(key, np.roll(tokens, 1).tobytes())
    with pytest.raises(IntegrityError, match="train-00000"):
        list(islice(opened(store, cache / "apart"), 10))
