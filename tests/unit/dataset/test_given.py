"""A tokenizer that the run file gives: its size, its end of text, and what is no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from orchestrator.dataset.given import END_OF_TEXT, read_given
from orchestrator.errors import SpecError
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import prepare_with, word_tokenizer


def data(path: Path | str, **fields: Any) -> DataSpec:
    return DataSpec(train="s3://corpus/**", tokenizer=str(path), **fields)


def save(path: Path, model: Any, added: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(path))
    return tokenizer


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
        models.WordLevel({"a": 0, "b": 5}, unk_token="a"),
        models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0),
    ],
)
def test_the_size_is_what_tokenizers_says(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = save(path, model, ["<pad>", "</s>"])
    found = read_given(data(path), MemoryStore())
    assert found is not None
    assert found.vocab_size == max(tokenizer.get_vocab().values()) + 1
    assert found.end_of_text_id == tokenizer.token_to_id("</s>")
    assert found.content == path.read_bytes()


@pytest.mark.parametrize("token", END_OF_TEXT)
def test_each_usual_end_of_text_is_found(tmp_path: Path, token: str) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = save(path, models.BPE({"a": 0}, []), ["<pad>", token])
    found = read_given(data(path), MemoryStore())
    assert found is not None
    assert found.end_of_text_id == tokenizer.token_to_id(token)


def test_another_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    save(path, models.BPE({"a": 0, "b": 1}, []), ["</s>", "<done>"])
    usual, named = read_given(data(path), MemoryStore()), read_given(data(path, end_of_text="<done>"), MemoryStore())
    assert usual is not None
    assert named is not None
    assert (usual.end_of_text_id, named.end_of_text_id) == (2, 3)
    assert usual.sha256 == named.sha256
    assert usual.fingerprint != named.fingerprint
    with pytest.raises(SpecError, match=r"data.end_of_text: .* has no token '<none>'"):
        read_given(data(path, end_of_text="<none>"), MemoryStore())


def test_one_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    save(path, models.BPE({"a": 0}, []), ["<fin>"])
    with pytest.raises(SpecError, match="none of the tokens that usually end a text") as caught:
        read_given(data(path), MemoryStore())
    assert "data.end_of_text" in caught.value.next_step


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b'{"model": {}}', b'{"model": {"vocab": {}}, "added_tokens": []}', b"[" * 100_000]
    + [json.dumps({"model": {"vocab": vocab}, "added_tokens": []}).encode() for vocab in ({"a": "b"}, ["a"], [1], 5)],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"is not a tokenizer\.json") as caught:
        read_given(data(path), MemoryStore())
    assert caught.value.next_step


@pytest.mark.parametrize("uri", ["nothing/tokenizer.json", "s3://tokenizers/none.json"])
def test_one_that_is_missing_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match=r"data\.tokenizer: ") as caught:
        read_given(data(uri), MemoryStore())
    assert caught.value.next_step


def test_none_is_none() -> None:
    assert read_given(DataSpec(train="s3://corpus/**"), MemoryStore()) is None


# -- prepared with it


@pytest.fixture
def corpus(memory_store: MemoryStore) -> MemoryStore:
    memory_store.at("tokenizers").upload("tokenizer.json", word_tokenizer())
    for number in range(20):
        memory_store.at("corpus").upload(f"{number:04d}.txt", f"w1 w{number} other".encode())
    return memory_store


def test_a_dataset_is_prepared_with_it(corpus: MemoryStore) -> None:
    given = data("s3://tokenizers/tokenizer.json", eval_fraction=0.3)
    manifest = prepare_with(corpus, given)
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.end_of_text_id) == (52, 1)
    assert corpus.get(f"datasets/here/{manifest.fingerprint}/tokenizer.json") == word_tokenizer()
    assert prepare_with(corpus, given.model_copy(update={"vocab_size": 999})) == manifest
    other = prepare_with(corpus, given.model_copy(update={"end_of_text": "w0"}))
    assert other.fingerprint != manifest.fingerprint
    assert other.tokenizer.end_of_text_id == 2


def test_one_that_tokenizers_refuses_is_told(corpus: MemoryStore) -> None:
    document = json.loads(word_tokenizer())
    document["model"]["type"] = "Other"
    corpus.at("tokenizers").tamper("tokenizer.json", json.dumps(document).encode())
    with pytest.raises(SpecError, match=r"s3://tokenizers/tokenizer\.json cannot be loaded") as caught:
        prepare_with(corpus, data("s3://tokenizers/tokenizer.json", eval_fraction=0.3))
    assert caught.value.next_step
