import io
import os
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from orchestrator import package as packaging
from orchestrator.errors import UsageError


@pytest.fixture
def tree(tmp_path):
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "run.yaml").write_text("a: 1\n")
    (work / "sub" / "task.py").write_text("x = 1\n")
    (work / "README.md").write_text("hello\n")
    for ignored in (".git/HEAD", ".venv/bin/python", ".headway/stack.json", "__pycache__/a.pyc", "sub/b.pyc"):
        path = work / ignored
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("never")
    return work


def names(package):
    return zipfile.ZipFile(io.BytesIO(package.data)).namelist()


def test_it_holds_the_files_and_not_what_is_ignored(tree):
    assert names(packaging.package(tree)) == ["README.md", "run.yaml", "sub/task.py"]


def test_the_same_files_give_the_same_bytes_whatever_their_times_and_modes(tree):
    first = packaging.package(tree)
    os.utime(tree / "run.yaml", (0, 0))
    (tree / "run.yaml").chmod(0o600)
    assert packaging.package(tree) == first


def test_the_digest_follows_names_and_bytes(tree):
    first = packaging.package(tree).digest
    (tree / "run.yaml").rename(tree / "other.yaml")
    renamed = packaging.package(tree).digest
    (tree / "other.yaml").write_text("a: 2\n")
    assert len({first, renamed, packaging.package(tree).digest}) == 3


def test_only_python_files_change_the_code_digest(tree):
    first = packaging.code_digest(tree)
    (tree / "README.md").write_text("edited")
    (tree / "run.yaml").write_text("edited")
    assert packaging.code_digest(tree) == first
    (tree / "sub" / "task.py").write_text("x = 2\n")
    assert packaging.code_digest(tree) != first


def test_an_ignore_file_adds_patterns(tree):
    (tree / ".headwayignore").write_text("# data\n*.md\n\nsub/\n")
    assert names(packaging.package(tree)) == [".headwayignore", "run.yaml"]


def test_an_exception_to_a_pattern_is_refused(tree):
    (tree / ".headwayignore").write_text("!keep.md\n")
    with pytest.raises(UsageError, match="no exception"):
        packaging.package(tree)


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [
        ("a/b/data.bin", "*.bin", True),
        ("a/b/data.bin", "a/b", False),
        ("a/b", "a/b", True),
        ("a/b", "/a/b", True),
        ("c/a/b", "a/b", False),
        ("venv", "venv/", True),
        ("my-venv", "venv", False),
    ],
)
def test_patterns(path, pattern, matches):
    assert packaging.ignored(PurePosixPath(path), [pattern]) is matches


def test_links_are_followed_inside_and_skipped_with_a_reason_outside(tree, tmp_path):
    outside = tmp_path / "secret"
    outside.write_text("secret")
    (tree / "out").symlink_to(outside)
    (tree / "folder").symlink_to(tree / "sub")
    (tree / "gone").symlink_to(tree / "nothing")
    (tree / "in").symlink_to(tree / "run.yaml")
    os.mkfifo(tree / "pipe")
    package = packaging.package(tree)
    assert names(package) == ["README.md", "in", "run.yaml", "sub/task.py"]
    assert package.skipped == (
        "folder: a link to a folder",
        "gone: a link to nothing",
        "out: a link out of the working directory",
        "pipe: neither a file nor a folder",
    )


def test_too_much_is_refused_and_the_biggest_are_named(tree):
    (tree / "data").mkdir()
    for name in ("a", "b"):
        (tree / "data" / name).write_bytes(bytes(2**20))
    with pytest.raises(UsageError, match=r"data \(2 MiB\).*\.headwayignore"):
        packaging.package(tree, max_bytes=2**20)


def test_a_file_is_no_working_directory(tree):
    with pytest.raises(UsageError, match="not a directory"):
        packaging.package(Path(tree / "run.yaml"))
