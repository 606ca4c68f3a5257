from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from orchestrator.errors import StoreError
from orchestrator.release import channels
from orchestrator.release.canary_policy import CanaryPolicy
from orchestrator.release.channels import CanaryStatus, ChannelStatus, ReplicaStatus
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore
from workloads.serve.counters import Counts, Histogram
from workloads.serve.decider import Decider
from workloads.serve.reports import ReplicaReport, Reply, Trial

POLICY = CanaryPolicy(window_s=60.0, min_requests=10)


class World:
    """A decider, and replicas that report to it."""

    now_s = 1000.0
    jumped_s = 0.0
    """How far the wall clock was set forward."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.restart()

    def restart(self) -> None:
        self.decider = Decider(
            store=self.store,
            model="lm",
            channel="production",
            policy=POLICY,
            expire_s=20.0,
            clock=lambda: self.now_s,
            wall_clock=lambda: self.now_s + self.jumped_s,
        )

    def report(self, replica: str, **fields: Any) -> Reply:
        return self.decider.report(ReplicaReport(replica=replica, **fields))

    def status(self) -> ChannelStatus:
        found = channels.read_status(self.store, "lm", "production")
        assert found is not None
        return found


@pytest.fixture
def world(memory_store: MemoryStore) -> World:
    return World(memory_store)


def trial(*, entry: int = 1, version: int = 2, stable: int = 0, canary: int = 0, failed: int = 0) -> Trial:
    return Trial(
        entry=entry,
        version=version,
        weight=0.1,
        stable=Counts(ok=stable, per_token=Histogram(buckets=(stable,))),
        canary=Counts(ok=canary, failed=failed, per_token=Histogram(buckets=(canary,))),
    )


def test_the_status_says_what_the_replicas_do(world: World) -> None:
    world.report("b")
    assert world.status() == ChannelStatus(replicas=(ReplicaStatus(id="b"),), updated_s=1000.0)
    world.report("b", serving=1, tried=1)
    world.report("a", serving=1, loading=2, tried=1, problem="down")
    assert world.status() == ChannelStatus(
        serving=1,
        tried=1,
        answered=(1,),
        replicas=(ReplicaStatus(id="a", serving=1, loading=2, problem="down"), ReplicaStatus(id="b", serving=1)),
        problem="down",
        updated_s=1000.0,
    )


def test_while_replicas_differ_the_version_before_is_named(world: World) -> None:
    seen = []
    for replica, version in (("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 3), ("a", None), ("b", None)):
        world.report(replica, serving=version)
        seen.append(world.status().serving)
    assert seen == [1, 1, 1, 2, 2, 3, None]


def test_a_replica_that_no_longer_reports_is_gone(world: World) -> None:
    world.report("a", serving=1)
    world.report("b", serving=2)
    world.now_s += 15.0
    world.report("b", serving=2)
    world.now_s += 15.0
    world.report("b", serving=2)
    assert [each.id for each in world.status().replicas] == ["b"]
    assert world.status().serving == 2


def test_a_version_that_fails_on_one_replica_is_rejected_for_all(world: World) -> None:
    world.report("a", serving=1, tried=1)
    world.report("b", serving=1, tried=2, failures={2: "odd weights"})
    world.report("a", serving=1, tried=1)
    assert world.status().rejected == {2: "odd weights"}
    assert world.status().tried == 2
    world.report("a", serving=1, failures={2: "other words"})
    assert world.status().rejected == {2: "odd weights"}


def test_a_version_that_answers_on_one_replica_is_rejected_for_none(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial())
    world.report("b", failures={1: "odd weights", 2: "odd weights"}, problem="lm@1 does not load: odd weights")
    assert world.status().rejected == {}
    assert world.status().problem == "lm@1 does not load: odd weights"
    world.report("a", serving=3)  # that they did answer is not forgotten
    world.report("b", serving=3, failures={2: "odd weights"})
    world.restart()
    world.report("b", failures={3: "odd weights"})
    assert world.status().rejected == {}


def test_a_version_that_has_ever_answered_is_rejected_for_no_load(world: World) -> None:
    world.report("a", serving=5)
    world.report("a", serving=6, canary=7, trial=trial(entry=3, version=7))
    world.report("a", serving=6)
    for failing in (5, 6, 7):
        world.restart()  # the status names no replica that has it
        world.report("b", failures={failing: "slow"})
    world.report("b", failures={8: "slow"})
    assert world.status().answered == (5, 6, 7)
    assert world.status().rejected == {8: "slow"}


def test_a_version_that_answered_before_the_cluster_restarted_twice_is_not_rejected(world: World) -> None:
    world.report("a", serving=5)
    for _ in range(2):
        world.restart()
        world.report("c")
        assert world.status().serving is None
    world.report("d", failures={5: "a bad disk"})
    assert world.status().rejected == {}


def test_a_status_without_the_versions_that_answered_tells_some_of_them(world: World) -> None:
    before = ChannelStatus(
        serving=1,
        promoted={3: 2},
        canary=CanaryStatus(entry=4, version=3, weight=0.1, since_s=900.0),
        replicas=(ReplicaStatus(id="a", serving=4, canary=5),),
    )
    document = before.model_dump(mode="json", exclude={"answered"})
    world.store.put_status(layout.channel_status("lm", "production"), document)
    world.report("b", failures=dict.fromkeys(range(1, 7), "slow"))
    assert world.status().answered == (1, 2, 3, 4, 5)
    assert world.status().rejected == {6: "slow"}


def test_two_deciders_lose_none_of_their_verdicts(world: World) -> None:
    other = World(world.store)  # of the cluster that the service moves to
    world.report("a", serving=1)
    other.report("b", serving=1)
    other.report("b", serving=1, failures={3: "odd weights"})
    passed(world)  # it has not heard of the other since
    world.report("a", serving=2, failures={4: "NaN"})
    other.report("b", serving=1, failures={5: "NaN"})
    assert world.status().rejected == {3: "odd weights", 4: "NaN", 5: "NaN"}
    assert world.status().promoted == {1: 2}
    assert world.status().answered == (1, 2)


def test_a_decider_takes_in_anothers_verdict_before_it_writes(world: World) -> None:
    other = World(world.store)
    world.report("a", serving=1, canary=2, trial=trial())
    other.report("b", serving=1, canary=2, trial=trial(failed=3))
    world.report("a", serving=3)
    assert world.status().serving == 3
    assert world.status().rejected.keys() == {2}


def test_a_decider_learns_of_anothers_verdict_though_it_has_nothing_to_write(world: World) -> None:
    told: list[int] = []
    world.decider.tell = lambda number, reason: told.append(number)
    other = World(world.store)
    world.report("a", serving=1, canary=2, trial=trial())
    other.report("b", serving=1, canary=2, trial=trial(failed=3))
    other.report("b", serving=4)
    verdict = other.status().canary
    world.now_s += 9.0
    world.report("a", serving=1, canary=2, trial=trial())
    assert told == []
    world.now_s += 1.0
    world.report("a", serving=1, canary=2, trial=trial())
    assert told == [2]
    world.report("a", serving=1, failures={4: "a bad disk"})
    assert world.status().rejected.keys() == {2}
    assert world.status().canary == verdict
    assert verdict is not None
    assert verdict.phase == "rejected"


def test_before_a_version_is_rejected_another_decider_may_tell_that_it_answers(world: World) -> None:
    other = World(world.store)
    world.report("a", serving=1)
    other.report("b", serving=2)
    world.report("a", serving=1, failures={2: "a bad disk"})
    assert world.status().rejected == {}


def test_what_a_decider_that_is_gone_wrote_last_is_written_over(world: World) -> None:
    other = World(world.store)
    world.report("a", serving=1)
    other.report("b", serving=1)
    assert [each.id for each in world.status().replicas] == ["b"]
    world.now_s += 10.0
    world.report("a", serving=1)
    assert [each.id for each in world.status().replicas] == ["a"]


def test_two_deciders_do_not_write_at_each_report(world: World) -> None:
    other = World(world.store)
    world.report("a", serving=1)
    other.report("b", serving=1)
    world.now_s += 9.0
    other.now_s += 9.0
    for _ in range(3):
        world.report("a", serving=1)
        other.report("b", serving=1)
    assert world.status().updated_s == 1000.0


def test_a_wall_clock_that_jumps_loses_no_replica_and_no_turn(world: World) -> None:
    world.report("c", serving=1)
    assert world.report("a", serving=1, wants_turn=True).has_turn
    for jumped_s in (3600.0, -3600.0):
        world.jumped_s = jumped_s
        assert world.report("b", serving=1, wants_turn=True) == Reply(has_turn=False, num_others=2)
    assert [each.id for each in world.status().replicas] == ["a", "b", "c"]
    assert world.status().updated_s == 4600.0  # of when b was new


def test_a_wall_clock_that_jumps_makes_no_canary_older(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial(stable=90, canary=10))
    world.jumped_s = 3600.0
    world.now_s += 10.0
    world.report("a", serving=1, canary=2, trial=trial(stable=90, canary=11))
    canary = world.status().canary
    assert canary is not None
    assert (canary.since_s, canary.verdict) == (1000.0, "Watched for 10 of 60 s.")
    assert world.status().updated_s == 4610.0


def test_a_report_that_was_overtaken_is_passed_over(world: World) -> None:
    world.report("b", serving=1)
    world.report("a", serving=2, sequence=2)
    assert world.report("a", sequence=1, serving=1, wants_turn=True) == Reply(num_others=1)
    assert [each.serving for each in world.status().replicas] == [2, 1]


def test_a_restart_forgets_no_decision(world: World) -> None:
    before = ChannelStatus(serving=1, tried=3, rejected={3: "NaN"}, promoted={1: 2}, updated_s=1.0)
    channels.write_status(world.store, "lm", "production", before)
    world.report("a", serving=2)
    after = world.status()
    assert (after.serving, after.tried, after.rejected, after.promoted) == (2, 3, {3: "NaN"}, {1: 2})


def test_what_is_no_status_is_written_anew(world: World) -> None:
    world.store.upload(layout.channel_status("lm", "production"), b"rubbish")
    world.report("a", serving=1)
    assert world.status().serving == 1


def test_the_status_is_written_when_it_says_something_new(world: World) -> None:
    world.report("a", serving=1)
    world.now_s += 10.0
    world.report("a", serving=1)
    assert world.status().updated_s == 1000.0
    world.report("a", serving=1, canary=2, trial=trial())
    assert world.status().updated_s == 1010.0
    for seconds, written_s in ((9.0, 1010.0), (1.0, 1020.0)):  # counts alone not each time
        world.now_s += seconds
        world.report("a", serving=1, canary=2, trial=trial(stable=int(world.now_s)))
        assert world.status().updated_s == written_s


def test_the_store_may_be_down_for_a_while(world: World) -> None:
    world.store.fail["get"] = StoreError("down")
    assert world.report("a", serving=1) == Reply()
    del world.store.fail["get"]
    world.store.fail["put_status"] = StoreError("down")
    world.report("a", serving=1, failures={2: "NaN"})
    world.store.fail.clear()
    world.report("a", serving=1, failures={2: "NaN"})
    assert world.status().rejected == {2: "NaN"}


def test_a_canary_is_judged_by_the_counts_of_all_replicas(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial(stable=6, canary=5))
    world.report("b", serving=1, canary=2, trial=trial(stable=6, canary=4))
    canary = world.status().canary
    assert canary is not None
    assert (canary.entry, canary.version, canary.since_s, canary.phase) == (1, 2, 1000.0, "watched")
    assert "too" not in canary.verdict
    world.now_s += 10.0
    world.report("a", serving=1, canary=2, trial=trial(stable=7, canary=6))
    canary = world.status().canary
    assert canary is not None
    assert (canary.stable.requests, canary.canary.requests) == (13, 10)
    assert canary.verdict == "Watched for 10 of 60 s."
    assert world.status().promoted == {}


def passed(world: World) -> None:
    for _ in range(5):
        world.report("a", serving=1, canary=2, trial=trial(stable=90, canary=10))
        world.now_s += 15.0
    world.report("a", serving=1, canary=2, trial=trial(stable=90, canary=10))


def test_a_canary_that_passes_is_promoted(world: World) -> None:
    passed(world)
    assert world.status().promoted == {1: 2}
    canary = world.status().canary
    assert canary is not None
    assert (canary.phase, canary.verdict) == ("passed", "It answered 10 requests, 0 of them failed.")
    world.report("a", serving=1, canary=2, trial=trial(stable=99, canary=11, failed=9))  # it has yet to hear of it
    world.report("a", serving=2)
    assert world.status().promoted == {1: 2}
    assert world.status().rejected == {}
    assert world.status().canary == canary
    assert world.status().serving == 2


def test_a_canary_that_fails_is_rejected(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial(stable=5, failed=3))
    assert world.status().rejected == {2: "It failed 3 of 3 requests, the stable version 0 of 5."}
    canary = world.status().canary
    assert canary is not None
    assert canary.phase == "rejected"
    world.restart()
    world.report("a", serving=1)
    assert world.status().canary == canary
    assert world.status().rejected


def test_a_canary_that_is_withdrawn_is_no_longer_named(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial())
    world.report("a", serving=1)
    assert world.status().canary is None


def test_a_canary_is_watched_on_while_the_replicas_find_a_decider_that_was_restarted(world: World) -> None:
    world.report("a", serving=1, canary=2, trial=trial(canary=3))
    before = world.status().canary
    world.restart()
    world.report("b", serving=1)
    assert world.status().canary == before
    world.now_s += 15.0
    world.report("a", serving=1, canary=2, trial=trial(canary=4))
    after = world.status().canary
    assert after is not None
    assert (after.phase, after.since_s, after.canary.requests) == ("watched", 1000.0, 4)
    world.restart()
    world.report("b", serving=1)
    world.now_s += 20.0
    world.report("b", serving=1)  # nobody has it any more
    assert world.status().canary is None


def test_the_newest_entry_is_the_one_that_is_judged(world: World) -> None:
    passed(world)
    world.report("a", serving=1, canary=2, trial=trial(entry=3))
    world.report("b", serving=1, canary=2, trial=trial(entry=1, failed=9))  # it has yet to hear of the newer one
    canary = world.status().canary
    assert canary is not None
    assert (canary.entry, canary.phase, canary.since_s) == (3, "watched", world.now_s)
    assert world.status().rejected == {}


def test_a_restart_goes_on_with_the_same_watch(world: World) -> None:
    started = CanaryStatus(entry=1, version=2, weight=0.1, since_s=900.0)
    channels.write_status(world.store, "lm", "production", ChannelStatus(serving=1, canary=started))
    world.report("a", serving=1, canary=2, trial=trial(stable=10, canary=10))
    assert world.status().promoted == {1: 2}


def test_one_replica_at_a_time_has_the_turn(world: World) -> None:
    world.report("b", serving=1)
    assert world.report("a", serving=1, wants_turn=True) == Reply(has_turn=True, num_others=1)
    assert world.report("b", serving=1, wants_turn=True) == Reply(has_turn=False, num_others=1)
    assert world.report("a", wants_turn=True) == Reply(has_turn=True, num_others=1)  # it reloads
    assert world.report("b", serving=1, wants_turn=True) == Reply(has_turn=False, num_others=0)
    world.report("a", serving=2)
    assert world.report("b", serving=1, wants_turn=True) == Reply(has_turn=True, num_others=1)


def test_a_replica_that_dies_in_its_turn_loses_it(world: World) -> None:
    world.report("c", serving=1)
    world.report("b", serving=1)
    assert world.report("a", serving=1, wants_turn=True).has_turn
    world.now_s += 15.0
    world.report("c", serving=1)
    assert not world.report("b", serving=1, wants_turn=True).has_turn
    world.now_s += 10.0
    assert world.report("b", serving=1, wants_turn=True).has_turn


def test_the_only_replica_gets_no_turn(world: World) -> None:
    assert world.report("a", serving=1, wants_turn=True) == Reply()


def test_the_actor_needs_no_torch() -> None:
    code = "import sys, workloads.serve.decider_actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
