"""The parts of preparing a stream that need no Ray: cutting, reading documents, tokenising a part, counting."""

from __future__ import annotations

import hashlib
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.format import Tokenizer, is_held_out
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.source import SourceFile, list_source, source_fingerprint
from orchestrator.errors import RunError
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from workloads.prepare import part_jobs, prepare_part, split_by_record
from workloads.prepare.assemble import assemble, unigram_loss
from workloads.prepare.documents import documents_of
from workloads.prepare.parts import Part, PartJob, cut
from workloads.prepare.vocabulary import END_OF_TEXT, store_trained

MIB = 2**20


def data(**fields: Any) -> DataSpec:
    return DataSpec(train="s3://corpus/**", **{"vocab_size": 300, "eval_fraction": 0.3, **fields})


def source_file(number: int, size_bytes: int) -> SourceFile:
    return SourceFile(uri=f"s3://corpus/{number:04d}", path=f"{number:04d}", etag="e", size_bytes=size_bytes)


# -- cut


@given(sizes=st.lists(st.integers(1, 40 * MIB), max_size=60))
def test_a_cut_keeps_every_file_in_order(sizes: list[int]) -> None:
    files = [source_file(number, size) for number, size in enumerate(sizes)]
    parts = list(cut(files))
    assert [file for part in parts for file in part] == files
    assert all(parts)
    limit = min(128 * MIB, max(MIB, sum(sizes) // 16))
    for part in parts:
        assert sum(file.size_bytes for file in part[:-1]) < limit
    assert len(parts) <= 17 or sum(sizes) > 16 * 128 * MIB
    assert list(cut(files)) == parts


# -- documents


def parquet(**columns: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def test_text_is_one_document() -> None:
    assert list(documents_of("naïve\n\ncafé 🙂\r\n".encode(), data())) == ["naïve\n\ncafé 🙂\r\n"]


def test_jsonl_is_a_document_a_line() -> None:
    texts = ["one", "two\nlines", "separators \u2028 \u2029 \x85 \x0b stay", ""]
    lines = "\r\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts) + "\n\n"
    assert list(documents_of(lines.encode(), data(format="jsonl"))) == texts
    assert list(documents_of(b'{"body": "x"}', data(format="jsonl", text_field="body"))) == ["x"]


def test_parquet_is_a_document_a_row() -> None:
    content = parquet(text=["one", None, "zwei ü"], other=[1, 2, 3])
    assert list(documents_of(content, data(format="parquet"))) == ["one", "zwei ü"]


PARQUET = parquet(text=["one", "two"])


@pytest.mark.parametrize(
    ("format_", "content"),
    [
        ("text", b"\xff\xfe binary"),
        ("jsonl", b"not json"),
        ("jsonl", b'{"text": "ok"}\n{"text": "cut'),
        ("jsonl", b'{"other": "field"}'),
        ("jsonl", b'{"text": 5}'),
        ("jsonl", b'{"text": null}'),
        ("jsonl", b'["text"]'),
        ("jsonl", b"7"),
        ("jsonl", b'{"text": "half a pair \\ud800"}'),
        ("jsonl", b"[" * 100_000),
        ("jsonl", b"\xff"),
        ("parquet", b""),
        ("parquet", b"PAR1 nothing PAR1"),
        ("parquet", PARQUET[:-1]),
        ("parquet", PARQUET[:20]),
        ("parquet", PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1"),
        ("parquet", parquet(other=["x"])),
        ("parquet", parquet(text=[1, 2])),
    ],
)
def test_what_is_not_in_the_format_is_told(format_: Any, content: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, RecursionError)):
        list(documents_of(content, data(format=format_)))


# -- a part


@pytest.fixture
def corpus(memory_store: MemoryStore) -> MemoryStore:
    for number in range(20):
        text = f"def function_{number}(argument):\n    return argument + {number}\n" * 5
        memory_store.at("corpus").upload(f"{number:04d}.py", text.encode())
    return memory_store


def prepared(store: MemoryStore, spec: DataSpec, *, num_parts: int = 2, prefix: str = "ds/") -> Any:
    """Tokenise and assemble without Ray. Returns the manifest and each split's tokens."""
    files = list_source(spec.train or "", store)
    by_record = split_by_record(spec, files)
    tokenizer = store_trained(spec, files, store, prefix, by_record=by_record)
    size = -(-len(files) // num_parts)
    jobs = [
        job_of(files[number * size : (number + 1) * size], spec, store, tokenizer, prefix, number, by_record=by_record)
        for number in range(num_parts)
    ]
    parts = [prepare_part(job, store) for job in jobs]
    manifest = assemble(spec, "code", source_fingerprint(spec, files), files, parts, tokenizer)
    tokens = {
        name: np.concatenate([np.frombuffer(store.get(prefix + shard.file), dtype="<u2") for shard in split.shards])
        for name, split in (("train", manifest.train), ("eval", manifest.eval))
    }
    return manifest, tokens, store.get(prefix + "tokenizer.json")


def job_of(
    files: list[SourceFile],
    spec: DataSpec,
    store: MemoryStore,
    tokenizer: Tokenizer,
    prefix: str,
    number: int,
    *,
    by_record: bool = False,
) -> PartJob:
    (job,) = part_jobs(spec, files, store, prefix, tokenizer, by_record=by_record)
    return job.model_copy(update={"number": number})


def test_the_same_source_gives_the_same_bytes_twice(corpus: MemoryStore) -> None:
    first, _, tokenizer = prepared(corpus, data(), prefix="one/")
    second, _, again = prepared(corpus, data(), prefix="two/")
    assert tokenizer == again
    assert first.model_copy(update={"created_s": 0.0}) == second.model_copy(update={"created_s": 0.0})
    objects = corpus.objects
    shards = {key.removeprefix("one/"): value for key, value in objects.items() if key.startswith("one/")}
    assert shards == {key.removeprefix("two/"): value for key, value in objects.items() if key.startswith("two/")}


@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_tokens_are_the_documents(corpus: MemoryStore, num_parts: int) -> None:
    import tokenizers

    spec = data()
    manifest, tokens, tokenizer_json = prepared(corpus, spec, num_parts=num_parts)
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert manifest.tokenizer.end_of_text_id == end
    files = list_source("s3://corpus/**", corpus)
    for name, split in (("train", manifest.train), ("eval", manifest.eval)):
        mine = [file for file in files if is_held_out(file.path, spec.eval_fraction) == (name == "eval")]
        texts = [corpus.at("corpus").get(file.path).decode() for file in mine]
        expected = [token for text in texts for token in [*tokenizer.encode(text).ids, end]]
        assert tokens[name].tolist() == expected
        assert (split.num_files, split.num_tokens) == (len(mine), len(expected))
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
    assert tokenizer.decode(tokens["train"][:20].tolist()).startswith("def function_")
    counts = [np.bincount(tokens[name], minlength=tokenizer.get_vocab_size()) for name in ("train", "eval")]
    assert manifest.unigram_loss == unigram_loss(*counts)


def test_a_part_done_twice_is_the_same_part(corpus: MemoryStore) -> None:
    files = list_source("s3://corpus/**", corpus)
    tokenizer = store_trained(data(), files, corpus, "ds/", by_record=False)
    job = job_of(files, data(), corpus, tokenizer, "ds/", 0)
    first = prepare_part(job, corpus)
    assert prepare_part(job, corpus) == first
    shard = first.splits["train"].shard
    assert shard is not None
    assert hashlib.sha256(corpus.get("ds/train-00000.bin")).hexdigest() == shard.pieces[0]


def test_a_jobs_and_a_parts_json_says_all_of_it(corpus: MemoryStore) -> None:
    files = list_source("s3://corpus/**", corpus)
    tokenizer = store_trained(data(), files, corpus, "ds/", by_record=False)
    job = job_of(files, data(), corpus, tokenizer, "ds/", 0)
    assert PartJob.model_validate_json(job.model_dump_json()) == job
    part = prepare_part(job, corpus)
    assert Part.model_validate_json(part.model_dump_json()) == part


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_one_file_is_split_by_its_texts(memory_store: MemoryStore, format_: Any) -> None:
    texts = [f"text number {number} of them" for number in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    memory_store.at("corpus").upload("all", lines if format_ == "jsonl" else parquet(text=texts))
    spec = data(format=format_)
    manifest, tokens, tokenizer_json = prepared(memory_store, spec, num_parts=1)
    held_out = [text for text in texts if is_held_out(text, spec.eval_fraction)]
    assert 5 < len(held_out) < 40
    import tokenizers

    decoded = tokenizers.Tokenizer.from_str(tokenizer_json.decode()).decode(tokens["eval"].tolist())
    assert decoded == "".join(held_out)
    assert (manifest.train.num_files, manifest.eval.num_files) == (1, 1)


def test_bad_files_are_counted_and_few_are_allowed(corpus: MemoryStore) -> None:
    corpus.at("corpus").upload("bad-0.py", b"\xff\xff")
    manifest, _, _ = prepared(corpus, data())
    assert (manifest.source["num_files"], manifest.source["num_skipped"]) == (21, 1)
    assert manifest.source["skipped"] == ["bad-0.py: it is not UTF-8"]
    assert manifest.counts == {"skipped_unreadable_file": 1}
    assert manifest.train.num_files + manifest.eval.num_files == 20
    corpus.at("corpus").upload("bad-1.py", b"\xff\xff")
    with pytest.raises(RunError, match="2 of 22 files are not text in UTF-8") as caught:
        prepared(corpus, data(), prefix="again/")
    assert "bad-0.py: it is not UTF-8; bad-1.py: it is not UTF-8." in caught.value.message


def test_half_a_surrogate_pair_costs_one_file_and_not_the_run(memory_store: MemoryStore) -> None:
    for number in range(20):
        line = json.dumps({"text": f"text number {number} " * 10})
        memory_store.at("corpus").upload(f"{number:04d}.jsonl", line.encode())
    memory_store.at("corpus").upload("half.jsonl", b'{"text": "half a pair \\ud800"}')
    manifest, _, _ = prepared(memory_store, data(format="jsonl"))
    assert manifest.source["skipped"] == ["half.jsonl: line 1: it holds half a surrogate pair, which is no text"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut', "Unterminated string starting at in column 10"),
        (b'{"body": "x"}', "it has no field 'text'"),
        (b'{"text": 5}', "the text field holds int, not text"),
        (b"[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_broken_line_is_named_with_its_file(memory_store: MemoryStore, line: bytes, why: str) -> None:
    memory_store.at("corpus").upload("all.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    spec = data(format="jsonl")
    with pytest.raises(RunError, match="the train split holds no text") as caught:
        prepared(memory_store, spec, num_parts=1)
    assert f"all.jsonl: line 3: {why}" in caught.value.message


def test_a_split_without_files_is_refused(corpus: MemoryStore) -> None:
    with pytest.raises(RunError, match="of 20 files 0 fall into the held-out split"):
        prepared(corpus, data(eval_fraction=1e-9))


def test_a_split_without_text_is_refused(memory_store: MemoryStore) -> None:
    memory_store.at("corpus").upload("all.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(RunError, match="the eval split holds no text"):
        prepared(memory_store, data(format="jsonl", eval_fraction=1e-9), num_parts=1)


def test_a_prepared_part_is_read_by_the_reader(corpus: MemoryStore, tmp_path: Any) -> None:
    spec = data()
    fingerprint = source_fingerprint(spec, list_source("s3://corpus/**", corpus))
    manifest, tokens, _ = prepared(corpus, spec, prefix=f"datasets/code/{fingerprint}/")
    reader = TokenReader(corpus, manifest, manifest.train, sequence_length=16, cache=tmp_path)
    found = reader.samples(np.arange(reader.num_samples, dtype=np.int64))
    assert found[:, :-1].ravel().tolist() == tokens["train"][: 16 * reader.num_samples].tolist()


# -- the yardstick


def test_unigram_loss_by_hand() -> None:
    # Training counts 3, 1, 0, each plus one: 4, 2, 1 of 7. Held out: one of the first, two of the last.
    by_hand = -(math.log(4 / 7) + 2 * math.log(1 / 7)) / 3
    assert unigram_loss([3, 1, 0], [1, 0, 2]) == pytest.approx(by_hand, rel=1e-12)
    assert unigram_loss([5, 5], [1, 1]) == pytest.approx(math.log(2))
    with pytest.raises(RunError, match="held-out split holds no tokens"):
        unigram_loss([1, 2], [0, 0])
