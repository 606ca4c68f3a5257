from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EnvironmentUnusable, StoreError
from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelStatus
from orchestrator.release.download import download_version
from orchestrator.release.versions import Version
from orchestrator.store import layout
from tests.tiny_model import release_version
from tests.unit.fakes import MemoryStore
from workloads.serve.follow import Follower
from workloads.serve.loads import FAILED_RETRY_S, MAX_RETRY_S, Loads
from workloads.serve.models import Fetched
from workloads.serve.reports import Reply


class ScriptedModels:
    """Stands for loading models; knows which directories do not hold one, and how large each is."""

    def __init__(self, store: MemoryStore, cache: Path) -> None:
        self._store, self._cache = store, cache
        self.loads: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.fail_warm_up: dict[str, Exception] = {}
        self.on_load: Callable[[str], Any] | None = None
        """Makes the engine of a content, which is itself otherwise."""
        self.num_bytes = 10
        self.free = 1000

    def fetch(self, version: Version) -> Fetched:
        return Fetched(version=version, directory=download_version(self._store, version, self._cache))

    def needed_bytes(self, fetched: Fetched) -> int:
        return self.num_bytes

    def free_bytes(self) -> int:
        return self.free

    def load(self, fetched: Fetched) -> Any:
        content = (fetched.directory / "config.json").read_text()
        self.loads.append(content)
        if content in self.fail:
            raise self.fail[content]
        return content if self.on_load is None else self.on_load(content)

    def warm_up(self, engine: Any) -> float:
        if str(engine) in self.fail_warm_up:
            error = self.fail_warm_up[str(engine)]
            raise type(error)(*error.args)  # one that is kept would keep the engine, by its traceback
        return 0.1


class ScriptedTurns:
    """Gives turns as it is told."""

    def __init__(self) -> None:
        self.reply = Reply()
        self.num_asked = self.num_given_back = 0

    def ask(self) -> Reply:
        self.num_asked += 1
        return self.reply

    def give_back(self) -> None:
        self.num_given_back += 1


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A channel, and a replica that follows it."""

    def __init__(self, store: MemoryStore, tmp_path: Path) -> None:
        self.store, self._tmp_path = store, tmp_path
        self.models, self.turns, self.clock = ScriptedModels(store, tmp_path / "cache"), ScriptedTurns(), Clock()
        self.follower = self.start()

    def start(self, *, memory_bytes: int | None = None) -> Follower:
        loads = Loads(
            store=self.store,
            model="lm",
            models=self.models,
            turns=self.turns,
            memory_bytes=memory_bytes,
            drain_s=0.0,
            clock=self.clock,
        )
        return Follower(channel="production", loads=loads)

    def release(self, *contents: str) -> None:
        for content in contents:
            directory = self._tmp_path / content
            directory.mkdir()
            (directory / "config.json").write_text(content)
            release_version(self.store, "lm", directory)

    def promote(self, version: int, canary: Canary | None = None) -> None:
        channels.append(self.store, "lm", "production", version=version, by="me", reason="", canary=canary)

    def decide(self, **fields: Any) -> None:
        """What the decider would write."""
        channels.write_status(self.store, "lm", "production", ChannelStatus(**fields))

    def step(self, *versions: int) -> None:
        """Promote each of the versions in turn, with a step after it; one step where there is none."""
        for version in versions:
            self.promote(version)
            self.follower.step()
        if not versions:
            self.follower.step()

    @property
    def serving(self) -> tuple[int | None, int | None]:
        """The stable version and the canary."""
        report = self.follower.report("a")
        return report.serving, report.canary


@pytest.fixture
def world(memory_store: MemoryStore, tmp_path: Path) -> World:
    return World(memory_store, tmp_path)


def test_an_empty_channel_is_waited_on(world: World) -> None:
    world.step()
    assert world.serving == (None, None)
    assert world.follower.problem is None
    world.release("one")
    world.step()
    assert world.serving == (None, None)  # published, but nobody promoted it
    world.step(1)
    assert world.serving == (1, None)
    assert world.follower.report("a").tried == 1


def test_each_version_is_loaded_once(world: World) -> None:
    world.release("one")
    world.step(1)
    world.step()
    world.step(1)
    assert world.models.loads == ["one"]


def test_promote_and_roll_back(world: World) -> None:
    world.release("one", "two")
    seen = []
    for version in (1, 2, 1):
        world.step(version)
        seen.append(world.serving[0])
    assert seen == [1, 2, 1]


def test_a_version_that_does_not_load_is_not_tried_again(world: World) -> None:
    world.release("one", "two", "three")
    world.models.fail["two"] = ValueError("odd weights")
    world.step(1, 2)
    world.step()
    assert world.serving == (1, None)
    assert world.models.loads == ["one", "two"]
    assert world.follower.report("a").failures == world.follower.rejected == {2: "ValueError: odd weights"}
    assert world.follower.report("a").tried == 2
    assert world.follower.problem == "lm@2 does not load: ValueError: odd weights"
    world.decide(rejected={2: "ValueError: odd weights"})
    world.step()
    assert world.follower.problem is None
    world.step(3)
    assert world.serving == (3, None)


def test_what_fails_here_alone_moves_to_no_older_version(world: World) -> None:
    world.release("one", "two", "three", "four")
    world.step(1)
    world.models.fail["four"] = ValueError("odd weights")
    for version in (2, 3, 4):
        world.promote(version)
    world.step()
    world.step()
    assert world.serving == (1, None)
    assert world.models.loads == ["one", "four"]
    world.decide(rejected={4: "odd weights"})
    world.step()
    assert world.serving == (3, None)


def test_a_replica_that_has_nothing_waits_for_the_decider_too(world: World) -> None:
    world.release("one", "two")
    world.models.fail |= {"one": ValueError("a broken node"), "two": ValueError("a broken node")}
    world.promote(1)
    world.step(2)
    world.step()
    assert world.follower.report("a").failures == {2: "ValueError: a broken node"}
    assert world.follower.problem == "lm@2 does not load: ValueError: a broken node"


def test_what_failed_by_its_own_fault_is_tried_again_in_the_end(world: World) -> None:
    world.release("one", "two")
    world.models.fail["two"] = ValueError("odd weights")
    world.step(1, 2)
    world.models.fail.clear()
    world.clock.now_s += FAILED_RETRY_S - 1.0
    world.step()
    assert world.serving == (1, None)
    world.clock.now_s += 1.0
    world.step()
    assert world.serving == (2, None)
    assert world.follower.report("a").failures == world.follower.rejected == {}
    assert world.follower.problem is None


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: unspecified launch failure"), OSError(28, "No space"), ImportError("lib.so")]
)
def test_what_the_machine_fails_is_no_fault_of_the_version(world: World, error: Exception) -> None:
    world.release("one")
    world.models.fail["one"] = error
    world.step(1)
    assert world.follower.report("a").failures == {}
    assert (world.follower.problem or "").startswith(f"This machine failed to load lm@1: {type(error).__name__}: ")
    world.models.fail.clear()
    world.clock.now_s += 1.0
    world.step()
    assert world.serving == (1, None)


def test_a_version_that_fails_is_freed_at_once(world: World) -> None:
    class Engine:
        """Full of cycles, as models are."""

        def __init__(self) -> None:
            self.itself = self

        def __str__(self) -> str:
            return "an engine"

    made: list[weakref.ref[Engine]] = []

    def make(_: str) -> Engine:
        engine = Engine()
        made.append(weakref.ref(engine))
        return engine

    world.release("one")
    world.models.on_load = make
    world.models.fail_warm_up["an engine"] = ValueError("NaN")
    world.step(1)
    assert [reference() for reference in made] == [None]


def test_a_version_that_fails_its_first_answer_is_rejected(world: World) -> None:
    world.release("one", "two")
    world.models.fail_warm_up["two"] = ValueError("NaN")
    world.step(1, 2)
    assert world.serving == (1, None)
    assert world.follower.rejected == {2: "ValueError: NaN"}


def test_a_corrupt_version_is_rejected_with_the_object_named(world: World) -> None:
    world.release("one", "two")
    world.store.tamper(layout.version("lm", 2) + "config.json", b"twa")
    world.step(1, 2)
    assert world.serving == (1, None)
    assert "versions/00002/config.json does not match" in world.follower.rejected[2]


def test_a_missing_file_is_a_rejection_not_an_outage(world: World) -> None:
    world.release("one")
    world.store.delete([layout.version("lm", 1) + "config.json"])
    world.step(1)
    assert "no such object" in world.follower.rejected[1]


def test_what_was_rejected_elsewhere_is_not_loaded_here(world: World) -> None:
    world.release("one", "two")
    world.decide(rejected={2: "NaN"})
    world.step(1, 2)
    assert world.serving == (1, None)
    assert world.models.loads == ["one"]


def test_a_version_that_is_rejected_while_it_serves_gives_way(world: World) -> None:
    world.release("one", "two")
    world.step(1, 2)
    world.decide(rejected={2: "another replica could not load it"})
    world.step()
    assert world.serving == (1, None)


def test_what_is_rejected_does_not_answer_though_nothing_else_can(world: World) -> None:
    world.release("one", "two")
    world.promote(1, Canary(version=2, weight=0.25))
    world.step()
    world.decide(rejected={1: "odd weights", 2: "odd weights"})
    world.step()
    assert world.serving == (None, None)
    assert world.follower.version is None
    assert not world.follower.serving.draining
    assert world.follower.rejected[1] == "odd weights"


def test_what_is_rejected_does_not_answer_though_the_one_before_does_not_load_now(world: World) -> None:
    world.release("one", "two")
    world.promote(1)
    world.step(2)
    world.models.fail["one"] = EnvironmentUnusable("The disk is full.")
    world.decide(rejected={2: "odd weights"})
    world.step()
    assert world.serving == (None, None)
    assert world.follower.problem == "The disk is full."
    world.models.fail.clear()
    world.clock.now_s += 1.0
    world.step()
    assert world.serving == (1, None)


def test_what_answers_goes_on_where_no_entry_can_be_read(world: World) -> None:
    world.release("one")
    world.step(1)
    world.store.delete([layout.channel_entry("lm", "production", 1)])
    world.step()
    assert world.serving == (1, None)


def test_an_outage_is_waited_out_with_growing_pauses(world: World) -> None:
    world.release("one")
    world.store.fail["download"] = EnvironmentUnusable("The disk is full.")
    world.step(1)
    assert world.serving == (None, None)
    assert world.follower.problem == "The disk is full."
    assert world.follower.rejected == {}
    del world.store.fail["download"]
    world.step()
    assert world.serving == (None, None)  # not at once
    world.clock.now_s += 1.0
    world.step()
    assert world.serving == (1, None)
    assert world.follower.problem is None


def test_an_entry_that_comes_while_another_is_waited_out_is_heard(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.fail["two"] = EnvironmentUnusable("The disk is full.")
    world.step(2)
    assert world.follower.problem == "The disk is full."
    world.step(1)
    assert world.follower.problem is None


def test_what_serves_outlives_the_store(world: World) -> None:
    world.release("one")
    world.step(1)
    for call in ("list", "get"):
        world.store.fail[call] = StoreError("down")
    world.step()
    assert world.serving == (1, None)
    assert world.follower.problem == "down"
    world.store.fail.clear()
    world.clock.now_s += 60.0
    world.step()
    assert world.follower.problem is None


def test_what_is_no_entry_and_what_is_no_status_are_passed_over(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.release("one")
    world.store.upload(layout.channel_status("lm", "production"), b"rubbish")
    world.promote(1)
    world.store.upload(layout.channel_entry("lm", "production", 2), b"rubbish")
    world.step()
    world.step()
    assert world.serving == (1, None)
    assert sorted(record.getMessage().split(" is passed")[0] for record in caplog.records) == ["An entry", "The status"]


def test_a_version_that_lies_about_its_files_is_rejected(world: World) -> None:
    world.release("one")
    key = layout.version_manifest("lm", 1)
    document = {**world.store.get_json(key), "files": {"../x": {"size_bytes": 0, "sha256": "0" * 64}}}
    world.store.put_status(key, document)
    world.step(1)
    assert "not a plain file name" in world.follower.rejected[1]


def test_a_canary_is_loaded_beside_and_counted_from_then_on(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    with world.follower.serving.versions()[0].counter.request():
        pass
    world.promote(1, Canary(version=2, weight=0.25))
    world.step()
    assert world.serving == (1, 2)
    assert world.follower.serving.weight == 0.25
    stable, canary = world.follower.serving.versions()
    for loaded in (stable, canary, canary):
        with loaded.counter.request():
            pass
    trial = world.follower.report("a").trial
    assert trial is not None
    assert (trial.entry, trial.version, trial.weight) == (2, 2, 0.25)
    assert (trial.stable.ok, trial.canary.ok) == (1, 2)
    world.promote(1, Canary(version=2, weight=0.5))  # another trial of the same version
    world.step()
    trial = world.follower.report("a").trial
    assert trial is not None
    assert (trial.entry, trial.canary.ok, world.follower.serving.weight) == (3, 0, 0.5)
    assert world.models.loads == ["one", "two"]


def test_a_canary_that_passed_takes_over_without_a_load(world: World) -> None:
    world.release("one", "two")
    world.promote(1, Canary(version=2, weight=0.25))
    world.step()
    world.decide(promoted={1: 2})
    world.step()
    assert world.serving == (2, None)
    assert world.follower.report("a").trial is None
    world.follower = world.start()
    world.step()  # a restart comes to the same
    assert world.serving == (2, None)
    assert world.models.loads == ["one", "two", "two"]


def test_a_canary_that_is_rejected_or_withdrawn_ends(world: World) -> None:
    world.release("one", "two", "three")
    world.promote(1, Canary(version=2, weight=0.25))
    world.step()
    world.decide(rejected={2: "NaN"})
    world.step()
    assert world.serving == (1, None)
    world.promote(1, Canary(version=3, weight=0.25))
    world.step()
    assert world.serving == (1, 3)
    world.step(1)
    assert world.serving == (1, None)
    assert world.follower.serving.weight == 0.0


def test_a_canary_that_does_not_load_leaves_the_stable_version_alone(world: World) -> None:
    world.release("one", "two")
    world.models.fail["two"] = ValueError("odd weights")
    world.promote(1, Canary(version=2, weight=0.25))
    world.step()
    assert world.serving == (1, None)
    assert world.follower.rejected == {2: "ValueError: odd weights"}


def test_a_promotion_goes_before_the_canary_that_comes_with_it(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.promote(2, Canary(version=1, weight=0.25))  # back to the old one, a little
    world.step()
    assert world.serving == (2, 1)
    assert world.models.loads == ["one", "two"]


def test_what_does_not_fit_is_refused_where_nobody_else_answers(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.free = 5
    world.step(2)
    assert world.serving == (1, None)
    assert world.follower.problem is not None
    assert "lm@2 does not fit beside the version that answers" in world.follower.problem
    assert "No other replica answers meanwhile" in world.follower.problem
    assert world.follower.rejected == {}
    world.step(1)
    assert world.follower.problem is None


def test_what_does_not_fit_waits_for_its_turn_then_loads_in_place(world: World) -> None:
    world.release("one", "two")
    world.follower = world.start(memory_bytes=15)
    world.step(1)
    world.turns.reply = Reply(num_others=1)
    world.step(2)
    assert world.serving == (1, None)
    assert world.follower.problem is not None
    assert "Another replica is reloading first" in world.follower.problem
    world.turns.reply = Reply(has_turn=True, num_others=1)
    world.step()
    assert world.serving == (2, None)
    assert world.follower.problem is None
    assert world.models.loads == ["one", "two"]
    assert world.turns.num_given_back == 3  # after each step


def test_the_version_before_comes_back_where_the_one_in_its_place_does_not_load(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.free = 5
    world.models.fail["two"] = MemoryError("not even alone")
    world.turns.reply = Reply(has_turn=True, num_others=1)
    world.step(2)
    assert world.serving == (1, None)
    assert world.models.loads == ["one", "two", "one"]
    assert world.follower.rejected == {}
    assert world.follower.problem == "lm@2 does not fit into memory now: not even alone."
    world.clock.now_s += MAX_RETRY_S
    world.step()  # each try costs a reload
    assert world.models.loads == ["one", "two", "one"]


def test_while_a_replica_reloads_it_names_the_version_before(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.free = 5
    world.turns.reply = Reply(has_turn=True, num_others=1)
    seen: list[int | None] = []

    def look(content: str) -> str:
        version = world.follower.version
        seen.append(None if version is None or not world.follower.serving.draining else version.number)
        return content

    world.models.on_load = look
    world.step(2)
    assert seen == [1]
    assert world.follower.version is not None
    assert world.follower.version.number == 2


def test_a_last_request_keeps_its_version_and_it_goes_on_answering(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.free = 5
    world.turns.reply = Reply(has_turn=True, num_others=1)
    held = world.follower.serving.versions()
    world.step(2)
    assert world.serving == (1, None)
    assert world.follower.problem is not None
    assert "waits for requests" in world.follower.problem
    del held
    world.clock.now_s += 1.0
    world.step()
    assert world.serving == (2, None)


def test_what_is_above_the_limit_alone_is_never_made_room_for(world: World) -> None:
    world.release("one", "two")
    world.follower = world.start(memory_bytes=15)
    world.step(1)
    world.models.num_bytes = 20
    world.turns.reply = Reply(has_turn=True, num_others=1)
    world.step(2)
    assert world.serving == (1, None)
    assert world.turns.num_asked == 0
    assert "lm@2 does not fit into memory" in (world.follower.problem or "")


def test_a_canary_that_does_not_fit_beside_is_refused(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.free = 5
    world.turns.reply = Reply(has_turn=True, num_others=1)
    world.promote(1, Canary(version=2, weight=0.5))
    world.step()
    assert world.serving == (1, None)
    assert "lm@2 does not fit beside" in (world.follower.problem or "")
    assert world.turns.num_asked == 0


def test_the_first_version_is_tried_whatever_the_estimate_says(world: World) -> None:
    world.release("one")
    world.models.free = 5
    world.step(1)
    assert world.serving == (1, None)


def test_too_little_memory_beside_another_is_no_fault_of_the_version(world: World) -> None:
    world.release("one", "two")
    world.step(1)
    world.models.fail["two"] = MemoryError("no")
    world.step(2)
    assert world.serving == (1, None)
    assert world.follower.rejected == {}
    assert "does not fit into memory now" in (world.follower.problem or "")
