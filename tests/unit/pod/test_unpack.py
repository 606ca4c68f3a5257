"""What was packed comes out the same, whole or not at all, and a hostile zip writes nothing."""

from __future__ import annotations

import io
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.package import package, unpack

FILES = {"run.yaml": b"a: 1\n", "sub/task.py": b"x = 1\n" * 1000, "sub/deep/empty": b""}
_PART = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12)
TREES = st.dictionaries(
    st.lists(_PART.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join),
    st.binary(max_size=300),
    max_size=6,
)


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def zip_of(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


@given(TREES)
def test_a_tree_comes_back_the_same(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source = write_tree(Path(scratch, "source"), files)
            source.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError):  # a name that is also a folder of another
            return
        packed = package(source)
        to = Path(scratch, "to", "code")
        unpack(packed.data, to, packed.digest)
        again = package(to)
        assert (again.digest, again.data) == (packed.digest, packed.data)


def test_modes_do_not_follow_the_umask(tmp_path: Path) -> None:
    packed = package(write_tree(tmp_path / "source", FILES))
    before = os.umask(0o077)
    try:
        unpack(packed.data, tmp_path / "to", packed.digest)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "to").rglob("*")}
    assert modes == {"run.yaml": 0o644, "sub": 0o755, "task.py": 0o644, "deep": 0o755, "empty": 0o644}


def test_doing_it_again_writes_nothing_even_beside_other_files(tmp_path: Path) -> None:
    packed, to = package(write_tree(tmp_path / "source", FILES)), tmp_path / "to"
    unpack(packed.data, to, packed.digest)
    before = (to / "run.yaml").stat()
    (to / "results.json").write_text("{}")
    unpack(packed.data, to, packed.digest)
    after = (to / "run.yaml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tree(to) == {**FILES, "results.json": b"{}"}


@pytest.mark.parametrize("there", [{"run.yaml": b"a: 2\n"}, {"thesis.tex": b"years of work"}], ids=["changed", "other"])
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, there: dict[str, bytes]) -> None:
    packed, to = package(write_tree(tmp_path / "source", FILES)), write_tree(tmp_path / "to", there)
    with pytest.raises(UsageError, match=r"holds other files.*Name an empty or a new folder"):
        unpack(packed.data, to, packed.digest)
    assert tree(to) == there


def test_a_call_that_was_killed_is_done_over(tmp_path: Path) -> None:
    packed = package(write_tree(tmp_path / "source", FILES))
    half = {".headway-unpacking/sub/task.py": b"x =", "run.yaml": FILES["run.yaml"]}
    to = write_tree(tmp_path / "to", half)
    unpack(packed.data, to, packed.digest)
    assert tree(to) == FILES


def test_an_empty_package_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    packed = package(tmp_path / "source")
    unpack(packed.data, tmp_path / "to", packed.digest)
    assert list((tmp_path / "to").iterdir()) == []


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def with_flag(data: bytes, flag: int) -> bytes:
    """The zip with a general purpose flag set in its one entry, in both headers."""
    changed = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        changed[data.index(signature) + offset] |= flag
    return bytes(changed)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "an absolute path": lambda: zip_of(("/etc/passwd", b"x")),
    "up and out": lambda: zip_of(("../x", b"x")),
    "up within": lambda: zip_of(("a/../../x", b"x")),
    "a dot": lambda: zip_of(("./x", b"x")),
    "an empty part": lambda: zip_of(("a//x", b"x")),
    "a folder": lambda: zip_of(("a/", b"")),
    "a link": lambda: zip_of((link("a"), b"/etc/passwd")),
    "a file that is a folder": lambda: zip_of(("a", b"x"), ("a/b", b"x")),
    "our own name": lambda: zip_of((".headway-unpacking/x", b"x")),
    "too much": lambda: zip_of(("zeros", bytes(2**21))),
    "more than it says": lambda: zip_of(("zeros", bytes(2**21))).replace(
        struct.pack("<I", 2**21), struct.pack("<I", 100)
    ),
    "a password": lambda: with_flag(zip_of(("a", b"x")), 1),
    "another digest": lambda: zip_of(("a", b"x")),
    "no zip": lambda: b"PK\x03\x04 and nothing else",
    "nothing": lambda: b"",
    "cut short": lambda: zip_of(("a", os.urandom(5000)))[:4000],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused_and_nothing_stays(tmp_path: Path, name: str) -> None:
    to = tmp_path / "deep" / "to"
    with pytest.raises(IntegrityError, match=r"[Cc]ode package"):
        unpack(HOSTILE[name](), to, "0" * 64, max_bytes=2**20)
    assert [path for path in tmp_path.rglob("*") if path not in (to, to.parent)] == []


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_of(("a", b"1"), ("a", b"2"))
    with pytest.raises(IntegrityError, match="twice"):
        unpack(data, tmp_path / "to", "0" * 64)


VALID = zip_of(*FILES.items())


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_gives_the_same_files_or_an_integrity_error(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(VALID)
    for position, value in changes:
        damaged[position] = value
    with tempfile.TemporaryDirectory() as scratch:
        source = write_tree(Path(scratch, "source"), FILES)
        to = Path(scratch, "to")
        try:
            unpack(bytes(damaged), to, package(source).digest)
        except IntegrityError:
            assert not to.exists() or list(to.iterdir()) == []
        else:
            assert tree(to) == FILES


def test_a_name_that_is_not_utf8_is_skipped_with_its_reason(tmp_path: Path) -> None:
    write_tree(tmp_path, FILES)
    (Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt"))).write_text("x")
    packed = package(tmp_path)
    assert packed.skipped == ("caf\\udce9.txt: its name is not UTF-8",)
