"""What stays on a node's disk of the directories that were made there, and what goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orchestrator.node_cache import IN_USE_S, NUM_KEPT, STALE_S, discard, taking


def take(directory: Path, *, used_ago_s: float = 0.0) -> None:
    with taking(directory):
        directory.mkdir(exist_ok=True)
        (directory / "file").write_bytes(b"content")
    aged(directory, used_ago_s)


def aged(path: Path, ago_s: float) -> None:
    then_s = time.time() - ago_s
    os.utime(path, (then_s, then_s))


def directories(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_those_stay_that_were_used_last(tmp_path: Path) -> None:
    for number in range(6):
        take(tmp_path / f"v{number}", used_ago_s=(9 - number) * IN_USE_S)
    take(tmp_path / "v1")
    assert len(directories(tmp_path)) == NUM_KEPT
    assert directories(tmp_path) == ["v1", "v4", "v5"]


def test_what_a_process_may_be_about_to_read_stays(tmp_path: Path) -> None:
    for number in range(6):
        take(tmp_path / f"v{number}", used_ago_s=IN_USE_S / 2)
    assert len(directories(tmp_path)) == 6


def test_what_a_dead_process_left_goes_in_time(tmp_path: Path) -> None:
    left, fresh = tmp_path / ".v1.0123.partial", tmp_path / ".v2.4567.partial"
    for path in (left, fresh):
        path.mkdir()
        (path / "file").write_bytes(b"half")
    aged(left, 2 * STALE_S)
    aged(fresh, STALE_S / 2)
    take(tmp_path / "v3")
    assert directories(tmp_path) == [fresh.name, "v3"]


def test_locks_go_with_their_directories(tmp_path: Path) -> None:
    for name in ("gone", "stays"):
        take(tmp_path / name)
        aged(tmp_path / f".{name}.lock", 2 * STALE_S)
    discard(tmp_path / "gone")
    take(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.lock", ".stays.lock", "other", "stays"]


def test_an_open_file_of_what_goes_can_be_read(tmp_path: Path) -> None:
    take(tmp_path / "v")
    with (tmp_path / "v" / "file").open("rb") as file:
        discard(tmp_path / "v")
        assert list(tmp_path.iterdir()) == [tmp_path / ".v.lock"]
        assert file.read() == b"content"


def test_a_folder_that_cannot_be_made_is_for_the_download_to_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with taking(tmp_path / "file" / "v"):
        pass
