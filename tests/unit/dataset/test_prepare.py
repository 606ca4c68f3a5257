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
from orchestrator.dataset.source import Slice, SourceFile, list_source, source_fingerprint
from orchestrator.errors import AttemptFailed, RunError
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import prepare_with
from workloads.prepare import part_jobs, prepare_part, split_by_record
from workloads.prepare.assemble import Gathered, assemble, unigram_loss
from workloads.prepare.clean import clean
from workloads.prepare.committed import PartDone
from workloads.prepare.documents import NotInFormat, texts
from workloads.prepare.parts import Part, PartJob, Tallied, Tally
from workloads.prepare.records import REASONS
from workloads.prepare.vocabulary import END_OF_TEXT, store_trained


def data(**fields: Any) -> DataSpec:
    return DataSpec(train="s3://corpus/**", **{"vocab_size": 300, "eval_fraction": 0.3, **fields})


def source_file(number: int, size_bytes: int) -> SourceFile:
    return SourceFile(uri=f"s3://corpus/{number:04d}", path=f"{number:04d}", etag="e", size_bytes=size_bytes)


# -- documents


def parquet(**columns: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=7)
    return out.getvalue()


def documents_of(content: bytes, spec: DataSpec, *, of: int = 1) -> tuple[list[str], list[str]]:
    """The documents of one file in so many slices, and what is said of what is none."""
    store = MemoryStore()
    store.at("corpus").upload("file", content)
    (file,) = list_source("s3://corpus/file", store) if content else [source_file(0, 0)]
    found: list[str] = []
    total = Tally()
    for _, tally, documents in texts(spec, [Slice(file=file, number=number, of=of) for number in range(of)], store):
        found += documents
        total.add(Tallied(**tally.tallied()))
    bad = [f"{bad.line} {bad.reason}{bad.detail and ': '}{bad.detail}" for bad in total.tallied()["bad"]]
    return found, bad


def test_text_is_one_document() -> None:
    assert documents_of("naïve\n\ncafé 🙂\r\n".encode(), data(clean=False)) == (["naïve\n\ncafé 🙂\r\n"], [])


TEXTS = ["one", "two\nlines", "separators \u2028 \u2029 \x85 \x0c stay", *[f"text {number}" for number in range(40)]]


@pytest.mark.parametrize("of", [1, 3])
def test_jsonl_is_a_document_a_line(of: int) -> None:
    lines = "\r\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in TEXTS) + "\n\n"
    assert documents_of(lines.encode(), data(format="jsonl"), of=of) == (TEXTS, [])
    assert documents_of(b'{"body": "x"}', data(format="jsonl", text_field="body")) == (["x"], [])


@pytest.mark.parametrize("of", [1, 3, 20])
def test_parquet_is_a_document_a_row(of: int) -> None:
    content = parquet(text=[*TEXTS, None], other=[1] * (len(TEXTS) + 1))
    assert documents_of(content, data(format="parquet"), of=of) == (TEXTS, [])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", "not_json: Expecting value in column 1"),
        (b'{"text": "cut', "not_json: Unterminated string starting at in column 10"),
        (b'{"other": "field"}', "no_text: it has no field 'text'"),
        (b'{"text": 5}', "no_text: its field 'text' holds int"),
        (b'["text"]', "not_an_object"),
        (b"7", "not_an_object"),
        (b'{"text": "half a pair \\ud800"}', "not_text"),
        (b"[" * 100_000, "not_json: it is nested too deeply"),
        (b"\xff", "not_utf8"),
    ],
)
def test_a_bad_line_is_counted_and_those_around_it_stay(line: bytes, why: str) -> None:
    content = b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n'
    assert documents_of(content, data(format="jsonl")) == (["one", "two"], [f"3 {why}"])
    for of in (2, 3):
        assert documents_of(content, data(format="jsonl"), of=of) == (["one", "two"], [f"3 {why}"])


def test_a_bad_row_is_counted() -> None:
    content = parquet(text=[1, 2])
    bad = ["1 no_text: its field 'text' holds int", "2 no_text: its field 'text' holds int"]
    assert documents_of(content, data(format="parquet")) == ([], bad)


PARQUET = parquet(text=["one", "two"])


@pytest.mark.parametrize(
    ("format_", "content"),
    [
        ("text", b"\xff\xfe binary"),
        ("parquet", b""),
        ("parquet", b"PAR1 nothing PAR1"),
        ("parquet", PARQUET[:-1]),
        ("parquet", PARQUET[:20]),
        ("parquet", PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1"),
        ("parquet", parquet(other=["x"])),
    ],
)
def test_what_is_not_in_the_format_is_told(format_: Any, content: bytes) -> None:
    with pytest.raises(NotInFormat):
        documents_of(content, data(format=format_))


# -- cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffone", "one"),
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
        ("a\0b\x1b[1m\tc\x0c\x0bd\x1f", "ab[1m\tc\x0cd"),
        ("naïve \ufeff 🙂 \x7f\x85", "naïve \ufeff 🙂 \x7f\x85"),
    ],
)
def test_what_is_cleaned(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert documents_of(text.encode(), data()) == ([expected], [])
    assert documents_of(text.encode(), data(clean=False)) == ([text], [])


@given(st.text())
def test_what_is_clean_stays(text: str) -> None:
    once = clean(text)
    assert clean(once) in (once, once.removeprefix("\ufeff"))
    assert not set(once) & {chr(code) for code in range(32)} - set("\n\t\f")


def test_a_text_of_nothing_is_left_out_and_counted(corpus: MemoryStore) -> None:
    corpus.at("corpus").upload("blank.py", b"\xef\xbb\xbf \r\n\0\n")
    manifest, _, _ = prepared(corpus, data())
    assert manifest.counts == {"skipped_empty": 1}
    assert manifest.source["num_skipped"] == 0


# -- source trees


def test_a_source_tree_is_without_what_does_not_belong_to_it(corpus: MemoryStore) -> None:
    place = corpus.at("corpus")
    before = source_fingerprint(data(format="source"), list_source("s3://corpus/**", corpus, tree=True))
    for name in (".git/config", "node_modules/x/a.js", "pkg/__pycache__/a.pyc", ".env"):
        place.upload(name, b"x = 1")
    place.upload("large.py", b"x" * (2**20 + 1))
    files = list_source("s3://corpus/**", corpus, tree=True)
    assert source_fingerprint(data(format="source"), files) == before
    place.upload("image.png", b"\x89PNG\0\0")
    place.upload("latin.py", b"caf\xe9")
    manifest = prepare_with(corpus, data(format="source"))
    assert manifest.counts == {
        "left_out_hidden": 2, "left_out_dependency": 2, "left_out_too_large": 1, "left_out_binary": 2,
    }  # fmt: skip
    assert manifest.train.num_files + manifest.eval.num_files == 20
    assert manifest.source["num_files"] == 22


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
    parts = Gathered(tokenizer.vocab_size)
    for job in jobs:
        parts.add(prepare_part(job, store))
    manifest = assemble(spec, "code", source_fingerprint(spec, files), files, parts, tokenizer, by_record=by_record)
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
    shard = first.part.splits["train"].shard
    assert shard is not None
    assert hashlib.sha256(corpus.get("ds/train-00000.bin")).hexdigest() == shard.pieces[0]


def test_a_jobs_and_a_parts_json_says_all_of_it(corpus: MemoryStore) -> None:
    files = list_source("s3://corpus/**", corpus)
    tokenizer = store_trained(data(), files, corpus, "ds/", by_record=False)
    job = job_of(files, data(), corpus, tokenizer, "ds/", 0)
    assert PartJob.model_validate_json(job.model_dump_json()) == job
    done = prepare_part(job, corpus)
    assert PartDone.model_validate_json(done.model_dump_json()) == done
    written = Part.model_validate_json(corpus.get("ds/parts/00000.json"))
    assert written.model_copy(update={"slices": ()}) == done.part
    assert [piece.path for piece in written.slices] == [file.path for file in files]


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
    with pytest.raises(AttemptFailed, match="2 of 22 files are not text in UTF-8") as caught:
        prepared(corpus, data(), prefix="again/")
    assert "bad-0.py: it is not UTF-8; bad-1.py: it is not UTF-8." in caught.value.message


def test_bad_records_are_counted_and_named_and_few_are_allowed(memory_store: MemoryStore) -> None:
    lines = [json.dumps({"text": f"text number {number} " * 10}).encode() for number in range(300)]
    for number, bad in enumerate([b'{"text": "cut', b'{"body": "x"}', b'{"text": "half \\ud800"}']):
        lines[100 * number + 50] = bad
    memory_store.at("corpus").upload("all.jsonl", b"\n".join(lines))
    spec = data(format="jsonl")
    manifest, _, _ = prepared(memory_store, spec, num_parts=1)
    assert (manifest.source["num_records"], manifest.source["num_bad_records"]) == (300, 3)
    assert manifest.source["bad_records"] == [
        f"all.jsonl:51 {REASONS['not_json']}: Unterminated string starting at in column 10",
        f"all.jsonl:151 {REASONS['no_text']}: it has no field 'text'",
        f"all.jsonl:251 {REASONS['not_text']}",
    ]
    assert manifest.counts == {"skipped_no_text": 1, "skipped_not_json": 1, "skipped_not_text": 1}
    with pytest.raises(AttemptFailed, match=r"3 of 300 records cannot be used \(at most 0.9% may be\)") as caught:
        prepared(memory_store, data(format="jsonl", max_bad_records=0.009), num_parts=1, prefix="again/")
    assert "all.jsonl:51 is not JSON" in caught.value.message


def test_none_may_be_bad_where_that_is_asked(corpus: MemoryStore) -> None:
    corpus.at("corpus").upload("bad-0.py", b"\xff\xff")
    with pytest.raises(AttemptFailed, match="1 of 21 files"):
        prepared(corpus, data(max_bad_records=0.0))


def test_a_dataset_that_stands_is_held_to_the_limit_of_now(corpus: MemoryStore) -> None:
    corpus.at("corpus").upload("bad-0.py", b"\xff\xff")
    assert prepare_with(corpus, data()) == prepare_with(corpus, data())
    with pytest.raises(AttemptFailed, match="1 of 21 files"):
        prepare_with(corpus, data(max_bad_records=0.0))


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
