"""Manifests that lie are refused before anything in them is used, and damage is found block by block."""

from __future__ import annotations

import copy
import json
import secrets
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.format import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    DTYPE_BYTES,
    KINDS,
    Manifest,
    block_index,
    covering_blocks,
    num_blocks,
    overlaps,
    parse_manifest,
    verify_blocks,
)
from orchestrator.errors import IntegrityError
from tests.unit.checkpoint.documents import changed, document, fragment, places

HUGE = 10**4000


def refused(change: Any) -> str:
    lying = copy.deepcopy(document())
    change(lying)
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(lying, source="s3://b/manifest.json")
    assert caught.value.message.startswith("s3://b/manifest.json is not a headway/checkpoint/1 manifest")
    return caught.value.message


def w(d: dict[str, Any]) -> list[dict[str, Any]]:
    fragments: list[dict[str, Any]] = d["parameters"]["w"]["fragments"]
    return fragments


def emb(d: dict[str, Any]) -> list[dict[str, Any]]:
    fragments: list[dict[str, Any]] = d["frozen"]["emb"]["fragments"]
    return fragments


def test_a_sound_manifest_is_read() -> None:
    manifest = parse_manifest(document(), source="x")
    assert manifest.size_bytes == 600
    assert {name: p.numel for name, p in manifest.parameters.items()} == {"w": 15, "scale": 1, "nothing": 0}
    assert manifest.frozen["emb"].numel == 6
    again = json.loads(manifest.model_dump_json())
    assert parse_manifest(again, source="x") == manifest


def test_a_hole_is_refused() -> None:
    assert "elements from 8 on are missing" in refused(lambda d: w(d)[1].update(start=9, length=6))
    assert "elements from 0 on are missing" in refused(lambda d: w(d).pop(0))
    assert "8 of 15 elements" in refused(lambda d: w(d).pop(1))
    assert "0 of 15 elements" in refused(lambda d: w(d).clear())
    assert "frozen emb: elements from 2 on" in refused(lambda d: emb(d)[1].update(start=3, length=3))
    assert "frozen emb: 2 of 6 elements" in refused(lambda d: emb(d).pop(1))


def test_an_overlap_is_refused() -> None:
    assert "given twice" in refused(lambda d: w(d)[1].update(start=7, length=8))
    assert "given twice" in refused(lambda d: w(d).append(fragment(1, 0, 8, 96)))
    assert "16 of 15" in refused(
        lambda d: w(d)[1].update(length=8, offsets={k: 100 + 32 * i for i, k in enumerate(KINDS)})
    )
    assert "given twice" in refused(lambda d: emb(d)[1].update(start=1, length=5))
    for length in (0, -7):
        assert "missing or given twice" in refused(lambda d, n=length: w(d)[1].update(length=n))


def test_bytes_that_two_tensors_share_are_refused() -> None:
    assert "parameter w and parameter w share bytes of rank-00000" in refused(
        lambda d: w(d)[0]["offsets"].update(exp_avg=96)
    )
    assert "share bytes of rank-00000" in refused(lambda d: d["buffers"]["count"].update(offset=192))
    assert "share bytes of rank-00001" in refused(lambda d: emb(d)[1].update(offset=185))
    assert "share bytes" in refused(lambda d: d["random"]["1/torch"].update(offset=176))


@pytest.mark.parametrize("offset", [-1, -4, 369, 400, 2**62, HUGE])
def test_bytes_outside_the_file_are_refused(offset: int) -> None:
    assert "lie outside" in refused(lambda d: w(d)[0]["offsets"].update(exp_avg=offset))
    at = offset if offset < 0 else offset + 30
    assert "lie outside" in refused(lambda d: d["buffers"]["count"].update(offset=at))
    assert "lie outside" in refused(lambda d: emb(d)[0].update(offset=at))
    assert "lie outside" in refused(lambda d: d["random"]["1/torch"].update(offset=at))


@pytest.mark.parametrize("name", ["w", "nothing", "emb"])
def test_a_name_that_two_tensors_have_is_refused(name: str) -> None:
    """Of the two an export could write one only, under a header that fits neither."""
    empty = {"dtype": "I64", "shape": [0], "file": 0, "offset": 0, "size_bytes": 0}
    assert f"{name} is there twice" in refused(lambda d: d["buffers"].update({name: empty}))


def test_other_kinds_than_adams_are_refused() -> None:
    refused(lambda d: w(d)[0]["offsets"].update(momentum=96))
    assert "lacks one of" in refused(lambda d: w(d)[0]["offsets"].pop("exp_avg_sq"))


@pytest.mark.parametrize(
    "key",
    ["../other/rank.safetensors", "../x", "/x", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\b", "", ".", "..", "a/"],
)
@pytest.mark.parametrize("name", ["key", "index_key"])
def test_a_key_that_leaves_the_folder_is_refused(key: str, name: str) -> None:
    assert "not a plain relative key" in refused(lambda d: d["files"][1].update({name: key}))


@pytest.mark.parametrize("file", [-1, 2, 10**9])
def test_a_file_that_is_not_listed_is_refused(file: int) -> None:
    assert "there is no file" in refused(lambda d: w(d)[0].update(file=file))
    assert "there is no file" in refused(lambda d: emb(d)[0].update(file=file))
    assert "there is no file" in refused(lambda d: d["buffers"]["count"].update(file=file))
    assert "there is no file" in refused(lambda d: d["random"]["1/torch"].update(file=file))


@pytest.mark.parametrize("dtype", ["pickle", "f32", "", "F128", "OBJECT"])
def test_a_dtype_that_nobody_knows_is_refused(dtype: str) -> None:
    assert "there is no dtype" in refused(lambda d: d["buffers"]["count"].update(dtype=dtype))
    assert "there is no dtype" in refused(lambda d: d["random"]["1/torch"].update(dtype=dtype))
    assert "there is no dtype" in refused(lambda d: d["frozen"]["emb"].update(dtype=dtype))


def test_sizes_that_cannot_be_are_refused() -> None:
    assert "there is no such shape" in refused(lambda d: d["parameters"]["w"].update(shape=[-3, -5]))
    assert "there is no such shape" in refused(lambda d: d["frozen"]["emb"].update(shape=[-2, -3]))
    assert "there is no such shape" in refused(lambda d: d["buffers"]["count"].update(shape=[-1, -2]))
    assert "is not 8 bytes" in refused(lambda d: d["buffers"]["count"].update(size_bytes=8))
    assert "is not 16 bytes" in refused(lambda d: d["buffers"]["count"].update(dtype="F32"))
    assert "negative" in refused(lambda d: d["files"][0].update(size_bytes=-1))
    refused(lambda d: d.update(block_bytes=1024))
    refused(lambda d: d.update(format="headway/checkpoint/2"))
    refused(lambda d: d.update(code="import os"))
    refused(lambda d: d["state"].update(precision="int4"))


@pytest.mark.parametrize(
    "shape", [[2**63], [2**40, 2**40], [HUGE], [0, HUGE], [HUGE] * 3, [1] * 10_000, [HUGE] * 20_000],
    ids=["63", "40-40", "huge", "zero-huge", "huge-3", "many", "huge-many"],
)  # fmt: skip
def test_a_huge_shape_is_refused_at_once(shape: list[int]) -> None:
    started = time.process_time()
    refused(lambda d: d["parameters"]["w"].update(shape=shape))
    refused(lambda d: d["parameters"]["nothing"].update(shape=shape))
    refused(lambda d: d["frozen"]["emb"].update(shape=shape))
    refused(lambda d: d["buffers"]["count"].update(shape=shape))
    assert time.process_time() - started < 1.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*KINDS, HUGE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NEAR = st.integers(-2, 20) | st.sampled_from([96, 184, 192, 200, 384, 400, "F32", "F64", "BF16", "delete"])


@settings(max_examples=500, derandomize=True, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(document())), JSON | NEAR), min_size=1, max_size=3))
def test_whatever_a_manifest_says_it_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    try:
        manifest = parse_manifest(changed(changes, document()), source="x")
    except IntegrityError:
        return
    assert_readable(manifest)


def assert_readable(manifest: Manifest) -> None:
    """Each element has its bytes, within its file."""
    for parameter in manifest.parameters.values():
        assert sum(n for _, _, n in overlaps(parameter.fragments, 0, parameter.numel)) == parameter.numel
        for f in parameter.fragments:
            for offset in f.offsets.values():
                assert 0 <= offset <= offset + 4 * f.length <= manifest.files[f.file].size_bytes
    for frozen in manifest.frozen.values():
        assert sum(n for _, _, n in overlaps(frozen.fragments, 0, frozen.numel)) == frozen.numel
        for piece in frozen.fragments:
            stop = piece.offset + DTYPE_BYTES[frozen.dtype] * piece.length
            assert 0 <= piece.offset <= stop <= manifest.files[piece.file].size_bytes
    for buffer in [*manifest.buffers.values(), *manifest.random.values()]:
        assert 0 <= buffer.offset <= buffer.offset + buffer.size_bytes <= manifest.files[buffer.file].size_bytes


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


@settings(derandomize=True, deadline=None)
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


@settings(derandomize=True, deadline=None)
@given(start=st.integers(0, 14), length=st.integers(1, 15))
def test_overlaps_find_each_element_once(start: int, length: int) -> None:
    length = min(length, 15 - start)
    parameter = parse_manifest(document(), source="x").parameters["w"]
    found = [f.start + skip + i for f, skip, n in overlaps(parameter.fragments, start, length) for i in range(n)]
    assert found == list(range(start, start + length))
