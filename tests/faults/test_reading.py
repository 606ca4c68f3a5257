"""Data that is read through a server and a network that fail: the same batches, and nothing damaged among them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from orchestrator.dataset.cache import LIMIT_VARIABLE
from orchestrator.dataset.format import DatasetManifest, Shard, Split
from orchestrator.dataset.torch import TokenDataset
from orchestrator.errors import IntegrityError, StoreError
from orchestrator.store import Store, layout
from tests.faults.conftest import HASTY, STEADY, behind
from tests.faults.proxy import Fault, FaultProxy, Kind, random_fault
from tests.small_disk import small_disk
from tests.unit.dataset.test_format import manifest

NAME, FINGERPRINT = "text", "0123456789abcdef"
LENGTH, BATCH, PIECE_BYTES = 128, 16, 16 * 2**10
NUM_STEPS = 60  # nearly all of the 1000 samples


@pytest.fixture
def dataset(store: Store) -> DatasetManifest:
    """Of two shards, 16 pieces."""
    tokens = np.random.default_rng(0).integers(0, 60_000, 128_001).astype("<u2")
    shards = []
    for number, part in enumerate(np.split(tokens, [70_000])):
        shard, data = Shard.of(f"train-{number:05d}.bin", part, piece_bytes=PIECE_BYTES)
        store.create(layout.dataset(NAME, FINGERPRINT) + shard.file, data)
        shards.append(shard)
    split = Split(shards=tuple(shards), num_tokens=len(tokens), num_bytes=1, num_files=1)
    found = DatasetManifest.model_validate(manifest(train=split, eval=split, piece_bytes=PIECE_BYTES))
    store.create_json(layout.dataset_manifest(NAME, FINGERPRINT), found.model_dump(mode="json"))
    return found


def opened(store: Store, cache: Path, *, num_steps: int = NUM_STEPS) -> TokenDataset:
    return TokenDataset(NAME, store=store, sequence_length=LENGTH, batch_size=BATCH, cache=cache, num_steps=num_steps)


def batches(store: Store, cache: Path) -> list[bytes]:
    return [batch["tokens"].numpy().tobytes() for batch in opened(store, cache)]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind=Kind.REFUSE, status=503, key=r"\.bin$", times=3),
        Fault(kind=Kind.REFUSE, status=500, key=r"\.bin$", times=3),
        Fault(kind=Kind.CUT_BEFORE, key=r"\.bin$", times=3),
        Fault(kind=Kind.LOSE_ANSWER, key=r"\.bin$", times=3),
        Fault(kind=Kind.CUT_ANSWER, key=r"\.bin$", at_bytes=9000, times=3),
        Fault(kind=Kind.STALL, key=r"\.bin$", at_bytes=9000, wait_s=2.0),
        Fault(kind=Kind.DELAY, key=r"\.bin$", wait_s=2.0),
        Fault(kind=Kind.FLIP_ANSWER, key=r"\.bin$", at_bytes=5, times=2),
    ],
    ids=lambda fault: fault.kind.name.lower() + (f"-{fault.status}" if fault.status else ""),
)
@pytest.mark.usefixtures("dataset")
def test_the_same_batches_come_through(store: Store, proxy: FaultProxy, tmp_path: Path, fault: Fault) -> None:
    expected = batches(store, tmp_path / "direct")
    proxy.add(fault)
    # A busy machine's slow answers cost tries as well.
    patience = replace(HASTY, attempts=12) if fault.wait_s else STEADY
    assert batches(behind(proxy, store, patience), tmp_path / "through") == expected
    assert sum(request.fault is not None for request in proxy.requests) == fault.times


@pytest.mark.usefixtures("dataset")
def test_the_same_batches_come_through_many_faults(store: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """Two in five requests fail; twelve in a row do so once in sixty thousand."""
    through = behind(proxy, store, replace(STEADY, attempts=12))
    expected = batches(store, tmp_path / "direct")
    proxy.failing_share = 0.4
    assert batches(through, tmp_path / "through") == expected
    assert through.retries >= sum(request.fault is not None for request in proxy.requests) > 0


@pytest.mark.usefixtures("dataset")
def test_random_faults_never_give_wrong_batches(store: Store, proxy: FaultProxy, tmp_path: Path) -> None:
    expected = batches(store, tmp_path / "direct")
    patience = replace(STEADY, read_timeout_s=2.0)  # less than a stall
    rng, ended = Random(1), 0
    for number in range(20):
        proxy.clear()
        proxy.add(*(random_fault(rng) for _ in range(4)))
        try:
            assert batches(behind(proxy, store, patience), tmp_path / f"{number}") == expected
        except (IntegrityError, StoreError):  # an error that says so is right as well
            ended += 1
    assert ended < 10


@pytest.mark.usefixtures("dataset")
def test_a_disk_that_fills_up_ends_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six of the sixteen pieces find room, and the next one finds room for half of it."""
    expected = batches(store, tmp_path / "direct")
    monkeypatch.setenv(LIMIT_VARIABLE, "1Gi")  # more than there is
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", 26 * 4096):
        assert batches(store, tmp_path / "small") == expected
        assert list((tmp_path / "small").rglob("*.partial")) == []
    assert sum("Data is not kept" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("dataset")
def test_workers_that_are_forked_have_connections_of_their_own(store: Store, tmp_path: Path, method: str) -> None:
    expected = batches(store, tmp_path / "alone")
    used = opened(store, tmp_path / method)
    list(islice(used, 3))  # connections are open now, and threads have run
    used.load_state_dict({**used.state_dict(), "step": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: what this is about
        loader = DataLoader(used, batch_size=None, num_workers=2, multiprocessing_context=method)
        found = [batch["tokens"] for batch in loader]
    assert all(isinstance(batch, torch.Tensor) for batch in found)
    assert [batch.numpy().tobytes() for batch in found] == expected


def test_a_shard_that_shrank_or_is_gone_is_named(dataset: DatasetManifest, store: Store, tmp_path: Path) -> None:
    key = layout.dataset(NAME, FINGERPRINT) + dataset.train.shards[1].file
    data = store.get(key)
    store.delete([key])
    with pytest.raises(StoreError, match=r"train-00001\.bin: no such object"):
        batches(store, tmp_path / "gone")
    store.create(key, data[:-40_000])
    with pytest.raises(IntegrityError, match=r"train-00001\.bin, bytes .* what lies there ends after"):
        batches(store, tmp_path / "shrunk")
