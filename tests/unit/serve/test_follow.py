from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EnvironmentUnusable, StoreError
from orchestrator.release import channels
from orchestrator.release.versions import Version
from orchestrator.store import layout
from tests.tiny_model import release_version
from tests.unit.fakes import MemoryStore
from workloads.serve.follow import Follower


class Loader:
    """Stands for loading a model; knows which directories do not hold one."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.fail: dict[str, Exception] = {}

    def __call__(self, version: Version, directory: Path) -> Any:
        content = (directory / "config.json").read_text()
        self.loads.append(content)
        if content in self.fail:
            raise self.fail[content]
        return content


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A channel, and a server that follows it."""

    def __init__(self, store: MemoryStore, tmp_path: Path) -> None:
        self.store, self._tmp_path = store, tmp_path
        self.loader, self.clock = Loader(), Clock()
        self.follower = self.start()

    def start(self, *, writes_status: bool = True) -> Follower:
        return Follower(
            store=self.store,
            model="lm",
            channel="production",
            cache_directory=self._tmp_path / "cache",
            load=self.loader,
            writes_status=writes_status,
            clock=self.clock,
        )

    def release(self, content: str) -> Version:
        directory = self._tmp_path / content
        directory.mkdir()
        (directory / "config.json").write_text(content)
        return release_version(self.store, "lm", directory)

    def promote(self, version: int) -> None:
        channels.append(self.store, "lm", "production", version=version, by="me", reason="")

    def serving(self) -> int | None:
        current = self.follower.current
        return None if current is None else current.version.number

    def status(self) -> channels.ChannelStatus:
        found = channels.read_status(self.store, "lm", "production")
        assert found is not None
        return found


@pytest.fixture
def world(memory_store: MemoryStore, tmp_path: Path) -> World:
    return World(memory_store, tmp_path)


def test_an_empty_channel_is_waited_on(world: World) -> None:
    world.follower.step()
    assert world.serving() is None
    assert world.status() == channels.ChannelStatus(updated_s=1000.0)
    world.release("one")
    world.follower.step()
    assert world.serving() is None  # published, but nobody promoted it
    world.promote(1)
    world.follower.step()
    assert world.serving() == 1
    assert (world.status().serving, world.status().tried) == (1, 1)


def test_each_version_is_loaded_once(world: World) -> None:
    world.release("one")
    world.promote(1)
    for _ in range(3):
        world.follower.step()
    world.promote(1)
    world.follower.step()
    assert world.loader.loads == ["one"]


def test_promote_and_roll_back(world: World) -> None:
    for content in ("one", "two"):
        world.release(content)
    seen = []
    for version in (1, 2, 1):
        world.promote(version)
        world.follower.step()
        seen.append(world.serving())
    assert seen == [1, 2, 1]


def test_a_version_that_does_not_load_is_rejected_and_not_tried_again(world: World) -> None:
    for content in ("one", "two", "three"):
        world.release(content)
    world.loader.fail["two"] = ValueError("odd weights")
    for version in (1, 2):
        world.promote(version)
        world.follower.step()
    for _ in range(3):
        world.follower.step()
    assert world.serving() == 1
    assert world.loader.loads == ["one", "two"]
    assert world.status().rejected == {2: "ValueError: odd weights"}
    assert (world.status().serving, world.status().tried) == (1, 2)
    world.promote(3)
    world.follower.step()
    assert world.serving() == 3


def test_a_corrupt_version_is_rejected_with_the_object_named(world: World) -> None:
    for content in ("one", "two"):
        world.release(content)
    world.store.tamper(layout.version("lm", 2) + "config.json", b"twa")
    for version in (1, 2):
        world.promote(version)
        world.follower.step()
    assert world.serving() == 1
    assert "versions/00002/config.json does not match" in world.status().rejected[2]


def test_a_missing_file_is_a_rejection_not_an_outage(world: World) -> None:
    world.release("one")
    world.store.delete([layout.version("lm", 1) + "config.json"])
    world.promote(1)
    world.follower.step()
    assert "no such object" in world.status().rejected[1]


def test_a_restart_comes_to_the_same_version(world: World) -> None:
    for content in ("one", "two"):
        world.release(content)
    world.loader.fail["two"] = ValueError("odd weights")
    for version in (1, 2):
        world.promote(version)
    world.follower.step()
    assert world.serving() == 1
    world.loader.loads.clear()
    world.follower = world.start()
    world.follower.step()
    assert world.serving() == 1
    assert world.loader.loads == ["one"]  # the rejected one was remembered
    assert world.status().rejected == {2: "ValueError: odd weights"}


def test_an_outage_is_waited_out_with_growing_pauses(world: World) -> None:
    world.release("one")
    world.promote(1)
    world.store.fail["download"] = EnvironmentUnusable("The disk is full.")
    world.follower.step()
    assert world.serving() is None
    assert world.status().problem == "The disk is full."
    assert world.status().rejected == {}
    del world.store.fail["download"]
    world.follower.step()
    assert world.serving() is None  # not at once
    world.clock.now_s += 1.0
    world.follower.step()
    assert world.serving() == 1
    assert world.status().problem is None


def test_what_serves_outlives_the_store(world: World) -> None:
    world.release("one")
    world.promote(1)
    world.follower.step()
    for call in ("list", "get", "put_status"):
        world.store.fail[call] = StoreError("down")
    world.follower.step()
    assert world.serving() == 1
    assert world.follower.status.problem == "down"
    world.store.fail.clear()
    world.clock.now_s += 60.0
    world.follower.step()
    assert world.status().problem is None


def test_an_entry_that_is_none_is_passed_over(world: World) -> None:
    world.release("one")
    world.promote(1)
    world.store.upload(layout.channel_entry("lm", "production", 2), b"rubbish")
    world.follower.step()
    assert world.serving() == 1


def test_a_foreign_status_is_written_anew(world: World) -> None:
    world.store.upload(layout.channel_status("lm", "production"), b"rubbish")
    world.release("one")
    world.promote(1)
    world.follower.step()
    assert world.status().serving == 1


def test_a_status_has_one_writer_and_changes_only_when_it_must(world: World) -> None:
    world.release("one")
    world.promote(1)
    other = world.start(writes_status=False)
    other.step()
    assert other.current is not None
    assert channels.read_status(world.store, "lm", "production") is None
    world.follower.step()
    world.clock.now_s += 100.0
    world.follower.step()
    assert world.status().updated_s == 1000.0


def test_a_version_that_lies_about_its_files_is_rejected(world: World) -> None:
    version = world.release("one")
    document = {**version.model_dump(mode="json"), "files": {"../x": {"size_bytes": 0, "sha256": "0" * 64}}}
    world.store.put_status(layout.version_manifest("lm", 1), document)
    world.promote(1)
    world.follower.step()
    assert "not a plain file name" in world.status().rejected[1]
