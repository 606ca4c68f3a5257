"""Which files a source's pattern names, in S3 and on a disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dataset.source import (
    MAX_DOCUMENT_BYTES,
    Slice,
    SourceFile,
    list_source,
    read_lines,
    read_source,
    require_documents_that_fit,
    source_fingerprint,
)
from orchestrator.errors import EmptySource, RunError, SpecError, StoreError, UsageError
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore

FILES = ["a.py", "b.txt", ".hidden.py", "pkg/c.py", "pkg/.d.py", "pkg/deep/e.py", "pkg/deep/f[1].py", "other/g.py"]

CASES: list[tuple[str, list[str]]] = [
    ("*.py", [".hidden.py", "a.py"]),
    ("**/*.py", [name for name in FILES if name.endswith(".py")]),
    ("**", FILES),
    ("pkg/*.py", ["pkg/c.py", "pkg/.d.py"]),
    ("pkg/**/*.py", [name for name in FILES if name.startswith("pkg/")]),
    ("?.py", ["a.py"]),
    ("?/*.py", []),
    ("pkg/*/e.py", ["pkg/deep/e.py"]),
    ("pk?/**/f[1].py", ["pkg/deep/f[1].py"]),
    ("pkg/d*p/?.py", ["pkg/deep/e.py"]),
    ("*", ["a.py", "b.txt", ".hidden.py"]),
]


@pytest.fixture
def bucket(memory_store: MemoryStore) -> MemoryStore:
    for name in FILES:
        memory_store.at("corpus").upload(f"src/{name}", name.encode())
    memory_store.at("corpus").upload("src/empty.py", b"")
    memory_store.at("corpus").upload("srcx/not-this.py", b"x")
    return memory_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "src" / "empty.py").touch()
    (tmp_path / "srcx").mkdir()
    (tmp_path / "srcx" / "not-this.py").write_text("x")
    return tmp_path


@pytest.mark.parametrize(("pattern", "expected"), CASES)
def test_patterns_mean_the_same_in_s3_and_on_a_disk(
    bucket: MemoryStore, folder: Path, pattern: str, expected: list[str]
) -> None:
    for whole in (f"s3://corpus/src/{pattern}", f"{folder}/src/{pattern}"):
        if not expected:
            with pytest.raises(EmptySource, match="matches no file"):
                list_source(whole, bucket)
            continue
        found = list_source(whole, bucket)
        assert [Path(file.uri).name for file in found] == [Path(name).name for name in sorted(expected)]
        assert [read_source(file, bucket).decode() for file in found] == sorted(expected)
        assert all(file.size_bytes == len(read_source(file, bucket)) for file in found)


def test_a_file_that_changed_since_it_was_listed_is_not_read(bucket: MemoryStore, folder: Path) -> None:
    found = [list_source(f"{where}/src/pkg/c.py", bucket)[0] for where in ("s3://corpus", folder)]
    bucket.at("corpus").tamper("src/pkg/c.py", b"other")
    (folder / "src/pkg/c.py").write_bytes(b"other")
    for file in found:
        with pytest.raises(RunError, match=f"{re.escape(file.uri)} was written over") as caught:
            read_source(file, bucket)
        assert "Submit again" in caught.value.next_step
        with pytest.raises(RunError, match="written over"):
            read_lines(Slice(file=file, number=1, of=2), bucket)
    bucket.at("corpus").delete(["src/pkg/c.py"])
    with pytest.raises(RunError, match="is gone since"):
        read_source(found[0], bucket)


def test_a_text_file_that_no_memory_would_hold_is_refused() -> None:
    small = SourceFile(uri="s3://corpus/a.txt", path="a.txt", etag="e", size_bytes=MAX_DOCUMENT_BYTES)
    large = replace(small, uri="s3://corpus/b.txt", size_bytes=MAX_DOCUMENT_BYTES + 2**20)
    require_documents_that_fit(DataSpec(train="s3://corpus/**"), [small])
    require_documents_that_fit(DataSpec(train="s3://corpus/**", format="jsonl"), [small, large])
    with pytest.raises(SpecError, match=r"s3://corpus/b\.txt one document of 257 MiB; the limit is 256 MiB") as caught:
        require_documents_that_fit(DataSpec(train="s3://corpus/**"), [small, large])
    assert "JSON lines" in caught.value.next_step


def test_a_folder_means_all_that_is_in_it(bucket: MemoryStore, folder: Path) -> None:
    for whole in ("s3://corpus/src", "s3://corpus/src/", f"{folder}/src", f"{folder}/src/"):
        assert [file.path for file in list_source(whole, bucket)] == sorted(FILES), whole


def test_one_file(bucket: MemoryStore, folder: Path) -> None:
    for whole in ("s3://corpus/src/pkg/c.py", f"{folder}/src/pkg/c.py", f"{folder}/src/pkg/deep/f[1].py"):
        (file,) = list_source(whole, bucket)
        assert file.path == Path(whole).name


def test_a_path_is_relative_to_the_fixed_part(bucket: MemoryStore) -> None:
    assert [file.path for file in list_source("s3://corpus/src/pkg/**/e.py", bucket)] == ["deep/e.py"]
    assert [file.path for file in list_source("s3://corpus/s*/pkg/c.py", bucket)] == ["src/pkg/c.py"]


@pytest.mark.parametrize("pattern", ["nothing/**", "nothing", "empty.py", "src.py"])
def test_a_source_without_files_is_refused(bucket: MemoryStore, folder: Path, pattern: str) -> None:
    for whole in (f"s3://corpus/src/{pattern}", f"{folder}/src/{pattern}"):
        with pytest.raises(EmptySource, match="matches no file") as caught:
            list_source(whole, bucket)
        assert caught.value.next_step


def test_a_local_pattern_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "src")
    store = MemoryStore()
    assert [file.path for file in list_source("pkg/*.py", store)] == [".d.py", "c.py"]
    assert [file.path for file in list_source("../src/pkg/*.py", store)] == [".d.py", "c.py"]


def test_a_pattern_needs_a_bucket(memory_store: MemoryStore) -> None:
    with pytest.raises(UsageError, match="not an S3 address"):
        list_source("s3:///a/*.py", memory_store)


def test_a_bucket_that_cannot_be_listed_is_an_error(memory_store: MemoryStore) -> None:
    class Down(MemoryStore):
        def at(self, bucket: str, prefix: str = "") -> MemoryStore:
            found = super().at(bucket, prefix)
            found.fail["list"] = StoreError("down")
            return found

    with pytest.raises(StoreError, match="down"):
        list_source("s3://corpus/**", Down())


def test_the_fingerprint_follows_content_and_not_place(bucket: MemoryStore, folder: Path, tmp_path: Path) -> None:
    data = DataSpec(train="s3://corpus/src/**/*.py")

    def of(pattern: str) -> str:
        return source_fingerprint(data, list_source(pattern, bucket))

    before = of(f"{folder}/src/**/*.py")
    (folder / "src").rename(folder / "moved")
    assert of(f"{folder}/moved/**/*.py") == before
    (folder / "moved" / "a.py").write_text("A.py")
    assert of(f"{folder}/moved/**/*.py") != before
    there = of("s3://corpus/src/**/*.py")
    bucket.at("corpus").tamper("src/a.py", b"A.py")
    assert of("s3://corpus/src/**/*.py") != there


# -- slices

LINES = st.lists(st.sampled_from([b"", b"a", b"bb", b"0123456789" * 3, "ü".encode()]), min_size=1, max_size=30)


@given(lines=LINES, of=st.integers(1, 12), ends=st.booleans())
def test_the_slices_of_a_file_are_its_lines_each_once(lines: list[bytes], of: int, ends: bool) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    if not content:
        return
    store = MemoryStore()
    store.at("corpus").upload("a.jsonl", content)
    (file,) = list_source("s3://corpus/a.jsonl", store)
    slices = [read_lines(Slice(file=file, number=number, of=of), store) for number in range(of)]
    assert b"".join(slices) == content
    assert all(piece.endswith(b"\n") for piece in slices[:-1] if piece and not content.endswith(piece))


def test_a_line_longer_than_slices_is_whole_in_one_of_them(tmp_path: Path) -> None:
    long = b"x" * 300_000
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"first\n" + long + b"\nlast\n")
    (file,) = list_source(str(path), MemoryStore())
    slices = [read_lines(Slice(file=file, number=number, of=6), MemoryStore()) for number in range(6)]
    assert slices == [b"first\n" + long + b"\n", b"", b"", b"", b"", b"last\n"]
