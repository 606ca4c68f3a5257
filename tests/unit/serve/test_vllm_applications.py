"""The lives of the versions' applications: who makes them, who waits for them, and who takes them away."""

from __future__ import annotations

import gc
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
from ray import serve as ray_serve

from orchestrator.errors import EnvironmentUnusable, IntegrityError, StoreError
from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelStatus, ReplicaStatus
from orchestrator.store import layout
from tests.tiny_model import save_model
from tests.unit.fakes import MemoryStore
from tests.unit.serve.applications import MAIN, Clock, FakeServe, fetched, load, replica
from workloads.serve.vllm_applications import Application
from workloads.serve.vllm_engine import versions_in_use
from workloads.serve.vllm_settings import VllmSettings

TRACEBACK = "The deployment failed to start 3 times in a row. Error:\nTraceback (most recent call last):\n  File x\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", seed=1, with_end=True)


@pytest.fixture
def serve() -> FakeServe:
    return FakeServe()


def promote(store: MemoryStore, version: int, canary: int | None = None) -> None:
    for number in (version, *([canary] if canary else [])):
        if not store.exists(layout.version_manifest("lm", number)):
            store.create_json(layout.version_manifest("lm", number), {})
    second = None if canary is None else Canary(version=canary, weight=0.1)
    channels.append(store, "lm", "production", version=version, by="me", reason="", canary=second)


def decide(store: MemoryStore, **fields: Any) -> None:
    channels.write_status(store, "lm", "production", ChannelStatus(**fields))


def test_a_load_waits_for_nothing(directory: Path, serve: FakeServe) -> None:
    models = replica(serve)
    with pytest.raises(EnvironmentUnusable, match="lm@1 begins to start"):
        models.load(fetched(directory))
    with pytest.raises(EnvironmentUnusable, match=r"lm@1 is still starting under vLLM. Serve says DEPLOYING\.$"):
        models.load(fetched(directory))
    serve.say(1, "DEPLOYING", f"{TRACEBACK}OSError: a first try")
    with pytest.raises(EnvironmentUnusable, match="Serve says DEPLOYING: OSError: a first try"):
        models.load(fetched(directory))
    serve.say(1, "RUNNING")
    models.load(fetched(directory))
    assert [name for name, _, _ in serve.deployed] == [f"{MAIN}@1"]


def test_others_wait_for_the_owner(directory: Path, serve: FakeServe) -> None:
    models = replica(serve, owns=lambda: False)
    with pytest.raises(EnvironmentUnusable, match="waits for the replica that makes its application headway-lm@1"):
        models.load(fetched(directory))
    serve.say(1, "DEPLOYING")
    with pytest.raises(EnvironmentUnusable, match="still starting"):
        models.load(fetched(directory))
    serve.say(1, "RUNNING")
    models.load(fetched(directory))
    assert (serve.deployed, serve.deleted) == ([], [])


def test_one_that_has_become_the_owner_makes_them(directory: Path, serve: FakeServe) -> None:
    rank = [1]
    models = replica(serve, owns=lambda: rank[0] == 0)
    with pytest.raises(EnvironmentUnusable, match="waits for the replica"):
        models.load(fetched(directory))
    rank[0] = 0
    load(serve, models, directory)
    assert [name for name, _, _ in serve.deployed] == [f"{MAIN}@1"]


def test_without_gpus_it_starts_anew_after_a_while(directory: Path, serve: FakeServe) -> None:
    clock = Clock()
    models = replica(serve, clock=clock, vllm=VllmSettings(max_start_s=100))
    for passed_s, words in (
        (0, "begins"),
        (99, "still starting"),
        (1, r"not ready under vLLM within 100 s, and starts anew. Serve says DEPLOYING\. Are there free GPUs"),
        (1, "waits until its former application headway-lm@1 is gone"),  # though Serve says DEPLOYING yet
    ):
        clock.now_s += passed_s
        with pytest.raises(EnvironmentUnusable, match=words):
            models.load(fetched(directory))
    serve.end()
    for passed_s, words in ((0, "begins"), (99, "still starting"), (1, "not ready")):
        clock.now_s += passed_s
        with pytest.raises(EnvironmentUnusable, match=words):
            models.load(fetched(directory))
    assert len(serve.deployed) == 2


def test_a_version_that_vllm_cannot_load_is_rejected(directory: Path, serve: FakeServe) -> None:
    serve.say(1, "DEPLOY_FAILED", f"Failed to update the deployments.\n{TRACEBACK}ValueError: no such architecture")
    words = r"vLLM cannot serve lm@1\. Serve says DEPLOY_FAILED: ValueError: no such architecture"
    with pytest.raises(IntegrityError, match=words):
        replica(serve, owns=lambda: False).load(fetched(directory))
    assert serve.deleted == []
    with pytest.raises(IntegrityError, match=words):
        replica(serve).load(fetched(directory))
    assert serve.deleted == [f"{MAIN}@1"]


@pytest.mark.parametrize("kind", ["StoreError", "EnvironmentUnusable"])
def test_a_store_that_fails_its_node_rejects_none(directory: Path, serve: FakeServe, kind: str) -> None:
    models = replica(serve)
    serve.say(1, "DEPLOY_FAILED", f"{TRACEBACK}orchestrator.errors.{kind}: The store does not answer.")
    with pytest.raises(EnvironmentUnusable, match=r"could not start .*DEPLOY_FAILED: The store does not answer\."):
        models.load(fetched(directory))
    serve.end()
    load(serve, models, directory)


def test_one_that_ran_before_is_not_rejected_for_being_unhealthy(directory: Path, serve: FakeServe) -> None:
    models = replica(serve)
    load(serve, models, directory)
    serve.say(1, "UNHEALTHY", "The deployments ['x'] are UNHEALTHY.")
    with pytest.raises(EnvironmentUnusable, match=r"Serve says UNHEALTHY: The deployments"):
        models.load(fetched(directory))
    assert serve.deleted == []


def test_an_application_outlives_its_last_use_by_a_while(directory: Path, serve: FakeServe) -> None:
    store, clock = MemoryStore(), Clock()
    models = replica(serve, store, clock=clock)
    first = load(serve, models, directory)
    promote(store, 2)
    second = load(serve, models, directory, 2)
    clock.now_s += 1000.0
    models.take_away()
    del first
    gc.collect()
    for passed_s, deleted in ((59.0, []), (1.0, [f"{MAIN}@1"])):
        clock.now_s += passed_s
        models.take_away()
        assert serve.deleted == deleted
    assert second is not None


def test_a_rollback_does_not_lose_its_application(directory: Path, serve: FakeServe) -> None:
    store, clock = MemoryStore(), Clock()
    models = replica(serve, store, clock=clock)
    promote(store, 2)
    load(serve, models, directory)
    gc.collect()
    back = []
    clock.now_s += 60.0
    serve.after_look = lambda: back.append(models.load(fetched(directory)))  # while the unused are looked for
    models.take_away()
    assert len(back) == 1
    assert serve.deleted == []


def test_a_rollback_to_one_that_is_going_waits_until_it_is_gone(directory: Path, serve: FakeServe) -> None:
    store, clock = MemoryStore(), Clock()
    models = replica(serve, store, clock=clock)
    promote(store, 2)
    load(serve, models, directory)
    gc.collect()
    clock.now_s += 60.0
    models.take_away()
    assert serve.deleted == [f"{MAIN}@1"]
    with pytest.raises(EnvironmentUnusable, match="former application"):  # Serve says RUNNING
        models.load(fetched(directory))
    serve.end()
    load(serve, models, directory)
    assert len(serve.deployed) == 2


def test_the_owner_takes_away_what_another_has_made(directory: Path, serve: FakeServe) -> None:
    store, clock = MemoryStore(), Clock()
    rank = {"a": 0, "b": 1}
    a = replica(serve, store, clock=clock, owns=lambda: rank["a"] == 0)
    b = replica(serve, store, clock=clock, owns=lambda: rank["b"] == 0)
    load(serve, a, directory)
    promote(store, 2)
    kept = [load(serve, a, directory, 2), load(serve, b, directory, 2)]
    gc.collect()
    rank.update(a=1, b=0)  # before it was taken away
    serve.there[f"{MAIN}-staging@1"] = Application(state="RUNNING")  # another channel's
    for passed_s in (100.0, 60.0):
        assert serve.deleted == []
        clock.now_s += passed_s
        a.take_away()
        b.take_away()
    assert serve.deleted == [f"{MAIN}@1"]
    assert len(kept) == 2


def test_what_the_owner_knew_counts_no_more_once_it_is_not(directory: Path, serve: FakeServe) -> None:
    store, rank = MemoryStore(), [0]
    models = replica(serve, store, owns=lambda: rank[0] == 0)
    serve.say(1, "DEPLOY_FAILED", "bad")
    with pytest.raises(IntegrityError):
        models.load(fetched(directory))
    rank[0] = 1
    serve.say(1, "RUNNING")  # the new owner's
    models.load(fetched(directory))
    assert serve.deleted == [f"{MAIN}@1"]


def test_nothing_is_taken_away_while_it_is_not_known_what_is_used(directory: Path, serve: FakeServe) -> None:
    store, clock = MemoryStore(), Clock()
    models = replica(serve, store, clock=clock)
    load(serve, models, directory)
    gc.collect()
    clock.now_s += 60.0
    store.fail["get"] = StoreError("down")
    with pytest.raises(StoreError):
        models.take_away()
    assert serve.deleted == []


def test_versions_in_use() -> None:
    store = MemoryStore()

    def used() -> set[int]:
        return set(versions_in_use(store, "lm", "production"))

    assert used() == set()
    promote(store, 1)
    promote(store, 2, canary=3)
    assert used() == {2, 3}
    decide(store, serving=2, promoted={2: 3})
    assert used() == {2, 3}
    decide(store, serving=2, rejected={3: "slow"})
    assert used() == {2}
    decide(store, serving=2, rejected={2: "bad", 3: "slow"}, replicas=(ReplicaStatus(id="a", serving=3),))
    assert used() == {1, 3}
    decide(store, rejected={3: "slow"}, replicas=(ReplicaStatus(id="a", canary=4), ReplicaStatus(id="b", loading=5)))
    assert used() == {2, 4, 5}


@pytest.mark.parametrize(
    ("main", "deleted"), [("RUNNING", []), ("DELETING", [f"{MAIN}@1", f"{MAIN}@7"]), (None, [f"{MAIN}@1", f"{MAIN}@7"])]
)
def test_all_versions_go_with_the_application_but_not_with_a_replica(
    directory: Path, serve: FakeServe, main: str | None, deleted: list[str]
) -> None:
    models = replica(serve)
    engine = load(serve, models, directory)
    serve.say(7, "RUNNING")  # made before this replica was
    del serve.there[MAIN]
    if main is not None:
        serve.there[MAIN] = Application(state=main)
    models.close()
    assert sorted(serve.deleted) == deleted
    assert engine is not None


def test_none_is_made_while_the_application_ends(directory: Path, serve: FakeServe) -> None:
    serve.there[MAIN] = Application(state="DELETING")
    with pytest.raises(EnvironmentUnusable, match="headway-lm is being taken away"):
        replica(serve).load(fetched(directory))
    assert serve.versions == []


def test_the_loop_outlives_a_store_that_is_down(serve: FakeServe) -> None:
    store, stop = MemoryStore(), threading.Event()
    store.fail["get"] = StoreError("down")
    serve.say(1, "RUNNING")
    serve.after_look = lambda: setattr(serve, "after_look", stop.set)  # the second look is the last
    replica(serve, store).run(stop, poll_s=0.0)
    assert stop.is_set()


def test_ray_has_what_is_asked_of_it() -> None:
    """Its own signatures; nothing is started."""
    inspect.signature(ray_serve.RunTarget).bind(target=None, name="x", route_prefix=None)
    inspect.signature(ray_serve.run_many).bind(
        [], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    inspect.signature(ray_serve.delete).bind("x", _blocking=False)
