"""Samples over the borders of shards, and bytes that are not what the manifest says."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.ahead import ReadAhead
from orchestrator.dataset.format import PIECE_BYTES, DatasetManifest, Shard, Split
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.dataset.rows import conversation_entries, labelled_row, packed_row
from orchestrator.errors import EnvironmentUnusable, IntegrityError, RunError, SpecError
from orchestrator.store import layout
from tests.unit.dataset.test_format import manifest
from tests.unit.fakes import MemoryStore

PREFIX = layout.dataset("text", "0123456789abcdef")


def make(
    store: MemoryStore, sizes: list[int], dtype: str = "uint16", *, piece_bytes: int = PIECE_BYTES
) -> tuple[DatasetManifest, np.ndarray]:
    """A dataset of shards of these sizes, and all its tokens."""
    tokens = np.random.default_rng(1).integers(0, 60_000, sum(sizes)).astype(f"<{dtype[0]}{int(dtype[4:]) // 8}")
    shards = []
    for number, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        shard, data = Shard.of(f"train-{number:05d}.bin", part, piece_bytes=piece_bytes)
        store.create(PREFIX + shard.file, data)
        shards.append(shard)
    split = Split(shards=tuple(shards), num_tokens=len(tokens), num_bytes=1, num_files=1)
    return DatasetManifest.model_validate(
        manifest(dtype=dtype, train=split, eval=split, piece_bytes=piece_bytes)
    ), tokens


def open_reader(store: MemoryStore, dataset: DatasetManifest, cache: Path, *, length: int = 8) -> TokenReader:
    return TokenReader(store, dataset, dataset.train, sequence_length=length, cache=cache)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(1, 30),
    dtype=st.sampled_from(["uint16", "uint32"]),
    piece_bytes=st.sampled_from([4, 12, 64, PIECE_BYTES]),
)
def test_samples_are_slices_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, dtype: str, piece_bytes: int
) -> None:
    store = MemoryStore(prefix="headway")
    dataset, tokens = make(store, sizes, dtype, piece_bytes=piece_bytes)
    reader = open_reader(store, dataset, tmp_path_factory.mktemp("cache"), length=length)
    assert reader.num_samples == max(0, (sum(sizes) - 1) // length)
    indices = np.arange(reader.num_samples, dtype=np.int64)[::-1]
    expected = [tokens[i * length : i * length + length + 1] for i in indices]
    found = reader.samples(indices)
    assert found.dtype == np.int64
    assert found.shape == (reader.num_samples, length + 1)
    assert found.tolist() == [sample.tolist() for sample in expected]
    reader.close()


def test_a_flipped_byte_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [20, 20])
    data = bytearray(memory_store.get(f"{PREFIX}train-00001.bin"))
    data[7] ^= 1
    memory_store.tamper(f"{PREFIX}train-00001.bin", bytes(data))
    reader = open_reader(memory_store, dataset, tmp_path)
    assert len(reader.samples(np.array([0]))) == 1  # of the other shard
    with pytest.raises(IntegrityError, match=r"train-00001\.bin.*does not match its digest"):
        reader.samples(np.array([3]))


def test_a_shrunk_shard_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [20, 20])
    memory_store.tamper(f"{PREFIX}train-00000.bin", memory_store.get(f"{PREFIX}train-00000.bin")[:-2])
    with pytest.raises(IntegrityError, match=r"train-00000\.bin.*ends after 38 of them"):
        open_reader(memory_store, dataset, tmp_path).samples(np.array([0]))


@pytest.mark.parametrize("file", ["../train-00000.bin", "/etc/passwd", "a/b.bin", "..", ""])
def test_a_path_for_a_shards_name_is_refused(memory_store: MemoryStore, tmp_path: Path, file: str) -> None:
    dataset, _ = make(memory_store, [20])
    shard = dataset.train.shards[0].model_copy(update={"file": file})
    split = dataset.train.model_copy(update={"shards": (shard,)})
    with pytest.raises(IntegrityError, match="outside its folder"):
        TokenReader(memory_store, dataset, split, sequence_length=8, cache=tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"\x00", lambda data: data[:-4]])
def test_a_damaged_copy_on_the_node_is_fetched_anew(memory_store: MemoryStore, tmp_path: Path, damage: object) -> None:
    dataset, tokens = make(memory_store, [20])
    open_reader(memory_store, dataset, tmp_path).samples(np.array([1]))
    (copy,) = tmp_path.rglob("*.bin")
    copy.write_bytes(damage(copy.read_bytes()))  # type: ignore[operator]
    reader = open_reader(memory_store, dataset, tmp_path)
    assert reader.samples(np.array([1])).tolist() == [tokens[8:17].tolist()]


def test_what_is_on_the_node_is_not_fetched_again(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [20])
    open_reader(memory_store, dataset, tmp_path).samples(np.array([1]))
    memory_store.fail["get_range"] = AssertionError("fetched again")  # type: ignore[assignment]
    again = open_reader(memory_store, dataset, tmp_path)
    again.samples(np.array([1]))
    assert again.counts() == {"cached_pieces": 1, "retries": 0, "evicted_pieces": 0}


def test_a_disk_that_cannot_be_written_is_named(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [20])
    (tmp_path / "pieces").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentUnusable, match="cannot be kept") as caught:
        open_reader(memory_store, dataset, tmp_path)
    assert "HEADWAY_CACHE" in caught.value.next_step


def test_too_few_samples_for_a_batch(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [20])
    reader = open_reader(memory_store, dataset, tmp_path)
    require_samples(reader, at_least=2, what="train")
    with pytest.raises(RunError, match="holds 2 samples of 8 tokens; 3 are needed"):
        require_samples(reader, at_least=3, what="train")


# -- rows


def make_rows(store: MemoryStore, kind: str, entries: np.ndarray, *, shard_rows: list[int]) -> DatasetManifest:
    """A dataset of these rows, shape (rows, R), so many to a shard."""
    shards = []
    for number, part in enumerate(np.split(entries.astype("<u4"), np.cumsum(shard_rows)[:-1])):
        shard, data = Shard.of(f"train-{number:05d}.bin", part.ravel())
        store.create(PREFIX + shard.file, data)
        shards.append(shard)
    split = Split(shards=tuple(shards), num_tokens=entries.size, num_bytes=1, num_files=1, num_targets=1)
    fields = {"classes": ("a", "b")} if kind == "labelled" else {}
    return DatasetManifest.model_validate(
        manifest(dtype="uint32", train=split, eval=split, kind=kind, row_tokens=entries.shape[1], **fields)
    )


def test_a_stream_is_rows_of_tokens(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [40])
    reader = open_reader(memory_store, dataset, tmp_path)
    indices = np.array([2, 0])
    found = reader.rows(indices)
    assert list(found) == ["tokens"]
    assert np.array_equal(found["tokens"], reader.samples(indices))


def test_rows_of_conversations(memory_store: MemoryStore, tmp_path: Path) -> None:
    entries = np.stack(
        [
            packed_row([conversation_entries([row, 2, 3], np.array([False, False, True]))] * 2, row_tokens=9, pad_id=99)
            for row in range(5)
        ]
    )
    dataset = make_rows(memory_store, "packed", entries, shard_rows=[2, 3])
    reader = open_reader(memory_store, dataset, tmp_path)
    assert reader.num_samples == 5
    found = reader.rows(np.array([4, 1]))
    assert found["tokens"].tolist() == [[row, 2, 3, row, 2, 3, 99, 99, 99] for row in (4, 1)]
    assert found["is_target"].tolist() == [[False, False, True] * 2 + [False] * 3] * 2
    assert found["positions"].tolist() == [[0, 1, 2] * 3] * 2
    assert [found[name].dtype for name in ("tokens", "is_target", "positions")] == [np.int64, np.bool_, np.int64]
    with pytest.raises(ValueError, match="packed samples"):
        reader.samples(np.array([0]))


def test_rows_of_labelled_texts(memory_store: MemoryStore, tmp_path: Path) -> None:
    entries = np.stack([labelled_row(row % 2, [row] * (row + 1), row_tokens=9, pad_id=99) for row in range(5)])
    dataset = make_rows(memory_store, "labelled", entries, shard_rows=[1, 4])
    found = open_reader(memory_store, dataset, tmp_path).rows(np.array([0, 3]))
    assert found["tokens"].tolist() == [[0] + [99] * 7, [3] * 4 + [99] * 4]
    assert (found["label"].tolist(), found["length"].tolist()) == ([0, 1], [1, 4])


def test_rows_of_another_length_than_the_runs_are_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    entries = np.stack([labelled_row(0, [1], row_tokens=9, pad_id=0)])
    dataset = make_rows(memory_store, "labelled", entries, shard_rows=[1])
    with pytest.raises(SpecError, match=r"sequence_length: 16 is not that of .*made for 8") as caught:
        open_reader(memory_store, dataset, tmp_path, length=16)
    assert "sequence_length 8" in caught.value.next_step


# -- more than is held, other processes


def test_more_pieces_than_stay_mapped(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, tokens = make(memory_store, [400, 399], piece_bytes=16)
    reader = TokenReader(memory_store, dataset, dataset.train, sequence_length=30, cache=tmp_path, mapped_bytes=3 * 16)
    for _ in range(2):
        for index in (0, 25, 3, 12):
            assert reader.samples(np.array([index])).tolist() == [tokens[index * 30 : index * 30 + 31].tolist()]
    assert reader.counts()["cached_pieces"] > 0  # let go of and taken up again
    reader.close()


def test_a_forked_child_reads_with_threads_of_its_own(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, tokens = make(memory_store, [400], piece_bytes=16)
    reader = open_reader(memory_store, dataset, tmp_path)
    reader.samples(np.array([0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running: what this is about
        child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(reader, tokens))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert reader.samples(np.array([30])).tolist() == [tokens[240:249].tolist()]
    reader.close()


def _read_in_child(reader: TokenReader, tokens: np.ndarray) -> None:
    assert reader.counts() == {}
    assert reader.samples(np.array([40, 0])).tolist() == [tokens[320:329].tolist(), tokens[:9].tolist()]
    reader.close()


# -- read ahead


def test_what_is_ahead_is_bounded_and_comes_before_it_is_asked_for(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [8001], piece_bytes=16)  # a piece to a sample
    reader = open_reader(memory_store, dataset, tmp_path)
    order = SampleOrder(fingerprint="f", seed=0, num_samples=reader.num_samples, global_batch_size=4, sequence_length=8)
    ahead = ReadAhead(reader, order, range(4), num_steps=200, ahead_bytes=40 * 16)
    for step in range(200):
        assert ahead.take(step).tolist() == order.batch(step).tolist()
        asked = len(reader._held)
        assert min(200, step + 8) * 4 <= asked <= (step + 14) * 8
    assert ahead.take(7).tolist() == order.batch(7).tolist()  # not the next: it starts there anew
    reader.close()


def test_steps_dealt_out_to_several(memory_store: MemoryStore, tmp_path: Path) -> None:
    dataset, _ = make(memory_store, [801])
    reader = open_reader(memory_store, dataset, tmp_path)
    order = SampleOrder(fingerprint="f", seed=0, num_samples=reader.num_samples, global_batch_size=4, sequence_length=8)
    ahead = ReadAhead(reader, order, range(1, 3), num_steps=50, every=3)
    for step in range(2, 50, 3):
        assert ahead.take(step).tolist() == order.batch(step)[1:3].tolist()
    reader.close()
