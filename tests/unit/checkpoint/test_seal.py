"""A sealed document is read only if every one of its bytes is what was sealed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.format import seal, unseal
from orchestrator.errors import IntegrityError
from orchestrator.spec import canonical_json
from tests.unit.checkpoint.documents import document

RANK_DOCUMENT: dict[str, Any] = {
    "file": {"key": "rank-00000.safetensors", "size_bytes": 10, "index_key": "r.index", "index_sha256": "ab" * 32},
    "fragments": [{"parameter": "wörter\x1f", "start": 0, "length": 1, "offsets": {"fp32": 1}}],
    "frozen": [],
    "whole": {},
}
FLOATS = {**document(), "created_s": 1e22, "state": {**document()["state"], "loss": 1e-05}}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "sha256"), JSON, max_size=4))
def test_what_was_sealed_is_unsealed(value: dict[str, Any]) -> None:
    assert unseal(seal(value), source="x") == value


@pytest.mark.parametrize("value", [document(), RANK_DOCUMENT, FLOATS], ids=["manifest", "rank", "floats"])
def test_every_single_flipped_bit_is_seen(value: dict[str, Any]) -> None:
    data = seal(value)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(IntegrityError, match="s3://b/x is damaged"):
                unseal(bytes(flipped), source="s3://b/x")


def test_every_cut_is_seen() -> None:
    data = seal(RANK_DOCUMENT)
    for length in range(len(data)):
        with pytest.raises(IntegrityError):
            unseal(data[:length], source="x")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'"sha256"', b"{}", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"sha256":null}', b'{"sha256":["a"]}', b'{"a":NaN,"sha256":""}', b'{"a":1e999,"sha256":""}',
        b'{"a":' + b"9" * 5000 + b',"sha256":""}', b'{"a":"\\ud800","sha256":""}',
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_what_is_no_sealed_document_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^x is damaged"):
        unseal(data, source="x")


def test_a_key_given_twice_is_refused() -> None:
    data = seal({"a": 1, "b": 2})
    with pytest.raises(IntegrityError):
        unseal(data.replace(b'{"a":1', b'{"a":7,"a":1'), source="x")
    digest = json.loads(data)["sha256"].encode()
    with pytest.raises(IntegrityError):
        unseal(data.replace(b'"sha256":', b'"sha256":"","sha256":'), source="x")
    assert digest in data


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(IntegrityError):
        unseal(seal({"a": 1}).decode().encode(encoding), source="x")


def test_spaces_and_another_order_are_refused() -> None:
    sealed = json.loads(seal({"a": 1, "b": 2}))
    for data in (json.dumps(sealed).encode(), b" " + canonical_json(sealed), canonical_json(sealed) + b"\n"):
        with pytest.raises(IntegrityError):
            unseal(data, source="x")
