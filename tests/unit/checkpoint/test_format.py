"""Manifests that lie are refused before anything in them is used, and damage is found block by block."""

from __future__ import annotations

import copy
import json
import secrets
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.catalog import committed_steps, read_manifest
from orchestrator.checkpoint.format import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    KINDS,
    Manifest,
    block_index,
    covering_blocks,
    num_blocks,
    overlaps,
    parse_manifest,
    verify_blocks,
)
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore


def fragment(file: int, start: int, length: int, at: int) -> dict[str, Any]:
    """A fragment whose three kinds lie one after the other from byte ``at`` on."""
    return {
        "file": file, "start": start, "length": length,
        "offsets": {kind: at + 4 * length * place for place, kind in enumerate(KINDS)},
    }  # fmt: skip


def document() -> dict[str, Any]:
    """A manifest of two ranks: a 3 × 5 matrix cut at element 8, a scalar, an empty tensor and a buffer."""
    files = [
        {
            "key": f"00001-ab/rank-{rank:05d}.safetensors", "size_bytes": size,
            "index_key": f"00001-ab/rank-{rank:05d}.index", "index_sha256": "0" * 64,
        }
        for rank, size in enumerate([400, 200])
    ]  # fmt: skip
    return {
        "format": "headway/checkpoint/1",
        "run_id": "run-1",
        "attempt": 1,
        "nonce": "ab",
        "world_size": 2,
        "created_s": 1.5,
        "state": {
            "step": 4, "tokens": 64, "loss": 3.5, "precision": "fp32", "optimizer_step": 4,
            "spec_sha256": "0" * 64, "dataset_fingerprint": "f",
        },
        "files": files,
        "parameters": {
            "w": {"shape": [3, 5], "fragments": [fragment(0, 0, 8, 96), fragment(1, 8, 7, 100)]},
            "scale": {"shape": [], "fragments": [fragment(0, 0, 1, 200)]},
            "nothing": {"shape": [0, 4], "fragments": []},
        },
        "buffers": {"count": {"dtype": "I64", "shape": [2], "file": 0, "offset": 384, "size_bytes": 16}},
    }  # fmt: skip


def refused(change: Any) -> str:
    changed = copy.deepcopy(document())
    change(changed)
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(changed, source="s3://b/manifest.json")
    assert caught.value.message.startswith("s3://b/manifest.json is not a headway/checkpoint/1 manifest")
    return caught.value.message


def test_a_sound_manifest_is_read() -> None:
    manifest = parse_manifest(document(), source="x")
    assert manifest.size_bytes == 600
    assert {name: p.numel for name, p in manifest.parameters.items()} == {"w": 15, "scale": 1, "nothing": 0}
    again = json.loads(manifest.model_dump_json())
    assert parse_manifest(again, source="x") == manifest


def w(changed: dict[str, Any]) -> list[dict[str, Any]]:
    fragments: list[dict[str, Any]] = changed["parameters"]["w"]["fragments"]
    return fragments


def test_a_hole_is_refused() -> None:
    assert "elements from 8 on are missing" in refused(lambda d: w(d)[1].update(start=9, length=6))
    assert "elements from 0 on are missing" in refused(lambda d: w(d).pop(0))
    assert "8 of 15 elements" in refused(lambda d: w(d).pop(1))
    assert "0 of 15 elements" in refused(lambda d: w(d).clear())


def test_an_overlap_is_refused() -> None:
    assert "given twice" in refused(lambda d: w(d)[1].update(start=7, length=8))
    assert "given twice" in refused(lambda d: w(d).append(fragment(1, 0, 8, 96)))
    assert "16 of 15" in refused(
        lambda d: w(d)[1].update(length=8, offsets={k: 100 + 32 * i for i, k in enumerate(KINDS)})
    )
    refused(lambda d: w(d)[1].update(length=0))
    refused(lambda d: w(d)[1].update(length=-7))


@pytest.mark.parametrize("offset", [-1, -4, 369, 400, 2**62])
def test_bytes_outside_the_file_are_refused(offset: int) -> None:
    assert "lie outside" in refused(lambda d: w(d)[0]["offsets"].update(exp_avg=offset))
    at = offset if offset < 0 else offset + 16
    assert "lie outside" in refused(lambda d: d["buffers"]["count"].update(offset=at))


def test_other_kinds_than_adams_are_refused() -> None:
    refused(lambda d: w(d)[0]["offsets"].update(momentum=96))
    assert "lacks one of" in refused(lambda d: w(d)[0]["offsets"].pop("exp_avg_sq"))


@pytest.mark.parametrize(
    "key",
    ["../other/rank.safetensors", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\b", "", ".", "..", "a/"],
)
@pytest.mark.parametrize("name", ["key", "index_key"])
def test_a_key_that_leaves_the_folder_is_refused(key: str, name: str) -> None:
    assert "not a plain relative key" in refused(lambda d: d["files"][1].update({name: key}))


@pytest.mark.parametrize("file", [-1, 2, 10**9])
def test_a_file_that_is_not_listed_is_refused(file: int) -> None:
    assert "there is no file" in refused(lambda d: w(d)[0].update(file=file))
    assert "there is no file" in refused(lambda d: d["buffers"]["count"].update(file=file))


def test_sizes_that_cannot_be_are_refused() -> None:
    assert "there is no shape" in refused(lambda d: d["parameters"]["w"].update(shape=[-3, -5]))
    assert "there is no shape" in refused(lambda d: d["buffers"]["count"].update(shape=[-1, -2]))
    assert "does not take" in refused(lambda d: d["buffers"]["count"].update(size_bytes=8))
    assert "does not take" in refused(lambda d: d["buffers"]["count"].update(dtype="F32"))
    assert "does not take" in refused(lambda d: d["buffers"]["count"].update(dtype="pickle"))
    assert "negative" in refused(lambda d: d["files"][0].update(size_bytes=-1))
    refused(lambda d: d.update(block_bytes=1024))
    refused(lambda d: d.update(format="headway/checkpoint/2"))
    refused(lambda d: d.update(code="import os"))
    refused(lambda d: d["state"].update(precision="int4"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


PLACES = places(document())


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JSON | st.just("delete")), min_size=1, max_size=3))
def test_whatever_a_manifest_says_it_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    changed: Any = copy.deepcopy(document())
    for path, value in changes:
        changed = put(changed, path, value)
    try:
        manifest = parse_manifest(changed, source="x")
    except IntegrityError:
        return
    for parameter in manifest.parameters.values():  # what is let through can be read
        assert sum(length for _, _, length in overlaps(parameter, 0, parameter.numel)) == parameter.numel
        for f in parameter.fragments:
            for offset in f.offsets.values():
                assert 0 <= offset <= offset + 4 * f.length <= manifest.files[f.file].size_bytes


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``, where there is such a place still."""
    if not path:
        return new
    try:
        if new == "delete" and len(path) == 1:
            del value[path[0]]
        else:
            value[path[0]] = put(value[path[0]], path[1:], new)
    except (KeyError, IndexError, TypeError):
        pass
    return value


# -- blocks


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_a_damaged_block_is_named(damaged: int) -> None:
    data = bytearray(secrets.token_bytes(3 * BLOCK_BYTES + 100))
    index = block_index(bytes(data))
    assert len(index) == DIGEST_BYTES * num_blocks(len(data)) == 4 * DIGEST_BYTES
    verify_blocks(bytes(data), 0, index, source="file")
    data[damaged * BLOCK_BYTES + 99] ^= 1
    with pytest.raises(IntegrityError, match=rf"^file: block {damaged} \(64 KiB from byte {damaged * BLOCK_BYTES}\)"):
        verify_blocks(bytes(data), 0, index, source="file")
    with pytest.raises(IntegrityError, match=f"block {damaged} "):
        verify_blocks(bytes(data[damaged * BLOCK_BYTES :]), damaged, index, source="file")


def test_blocks_beyond_the_index_are_damaged() -> None:
    data = secrets.token_bytes(2 * BLOCK_BYTES)
    with pytest.raises(IntegrityError, match="block 1 "):
        verify_blocks(data, 0, block_index(data)[:DIGEST_BYTES], source="file")


@given(st.data())
def test_covering_blocks_cover_and_no_more(data: st.DataObject) -> None:
    file_bytes = data.draw(st.integers(1, 5 * BLOCK_BYTES))
    start = data.draw(st.integers(0, file_bytes - 1))
    num_bytes = data.draw(st.integers(1, file_bytes - start))
    blocks = covering_blocks(start, num_bytes, file_bytes)
    assert blocks.start == blocks.first * BLOCK_BYTES
    assert blocks.start <= start < blocks.start + BLOCK_BYTES
    assert start + num_bytes <= blocks.stop <= min(file_bytes, start + num_bytes + BLOCK_BYTES - 1)
    assert blocks.stop % BLOCK_BYTES == 0 or blocks.stop == file_bytes


@given(start=st.integers(0, 14), length=st.integers(1, 15))
def test_overlaps_find_each_element_once(start: int, length: int) -> None:
    length = min(length, 15 - start)
    parameter = parse_manifest(document(), source="x").parameters["w"]
    found = [f.start + skip + i for f, skip, n in overlaps(parameter, start, length) for i in range(n)]
    assert found == list(range(start, start + length))


# -- the catalog


def commit(store: MemoryStore, step: int, data: bytes | None = None) -> None:
    changed = document()
    changed["state"]["step"] = step
    store.create(layout.checkpoint_manifest("run-1", step), json.dumps(changed).encode() if data is None else data)


def test_only_what_has_a_manifest_is_committed(memory_store: MemoryStore) -> None:
    for step in (4, 100, 12):
        commit(memory_store, step)
    memory_store.create(layout.checkpoint("run-1", 200) + "00001-ab/rank-00000.json", b"{}")
    memory_store.create(layout.checkpoint("run-1", 300) + "00001-ab/manifest.json", b"{}")
    memory_store.create(layout.checkpoints("run-1") + "step-x/manifest.json", b"{}")
    memory_store.create(layout.checkpoint_manifest("run-10", 500), b"{}")
    assert committed_steps(memory_store, "run-1") == [100, 12, 4]
    manifest, digest = read_manifest(memory_store, "run-1", 12)
    assert (manifest.state.step, len(digest)) == (12, 64)
    assert isinstance(manifest, Manifest)
    with pytest.raises(NotFound):
        read_manifest(memory_store, "run-1", 200)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(memory_store: MemoryStore, data: bytes) -> None:
    commit(memory_store, 4, data)
    with pytest.raises(IntegrityError, match=r"step-00000004/manifest\.json is not"):
        read_manifest(memory_store, "run-1", 4)


def test_a_manifest_in_another_place_is_refused(memory_store: MemoryStore) -> None:
    commit(memory_store, 4)
    data = memory_store.get(layout.checkpoint_manifest("run-1", 4))
    memory_store.create(layout.checkpoint_manifest("run-1", 8), data)
    memory_store.create(layout.checkpoint_manifest("run-2", 4), data)
    for run_id, step in (("run-1", 8), ("run-2", 4)):
        with pytest.raises(IntegrityError, match="belongs to step 4 of run-1"):
            read_manifest(memory_store, run_id, step)
