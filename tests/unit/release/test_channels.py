from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.release import channels
from orchestrator.release.channels import Canary, CanaryStatus, ChannelStatus
from orchestrator.store import layout
from tests.unit.fakes import MemoryStore


@pytest.fixture
def store(memory_store: MemoryStore) -> MemoryStore:
    for number in (1, 2):
        memory_store.upload(layout.version_manifest("lm", number), b"{}")
    return memory_store


def append(store: MemoryStore, version: int, **more: object) -> channels.ChannelEntry:
    return channels.append(store, "lm", "production", version=version, by="me", reason="why", **more)  # type: ignore[arg-type]


def test_the_newest_entry_is_in_force(store: MemoryStore) -> None:
    assert channels.newest(store, "lm", "production") is None
    first = append(store, 1, run_id="run-1")
    second = append(store, 2, canary=Canary(version=1, weight=0.1))
    back = append(store, 1)
    assert [entry.number for entry in (first, second, back)] == [1, 2, 3]
    assert channels.newest(store, "lm", "production") == back
    assert channels.history(store, "lm", "production").entries == (first, second, back)
    assert channels.newest(store, "lm", "staging") is None


def test_an_entry_names_a_version_that_exists(store: MemoryStore) -> None:
    with pytest.raises(UsageError, match="no version lm@7"):
        append(store, 7)
    with pytest.raises(UsageError, match="no version lm@7"):
        append(store, 1, canary=Canary(version=7, weight=0.5))
    assert channels.history(store, "lm", "production") == channels.History()


def test_racing_appends_all_get_a_number(store: MemoryStore) -> None:
    barrier = threading.Barrier(8)

    def race(_: int) -> int:
        barrier.wait()
        return append(store, 1).number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(race, range(8))) == list(range(1, 9))


def test_a_status_is_no_entry(store: MemoryStore) -> None:
    assert channels.read_status(store, "lm", "production") is None
    status = ChannelStatus(serving=1, tried=2, rejected={2: "NaN"}, updated_s=5.0)
    channels.write_status(store, "lm", "production", status)
    assert channels.read_status(store, "lm", "production") == status
    assert channels.entry_numbers(store, "lm", "production") == []


def test_verdicts_of_two_statuses_are_joined() -> None:
    own = ChannelStatus(serving=1, rejected={3: "NaN"}, promoted={1: 1}, problem="down", updated_s=5.0)
    other = ChannelStatus(serving=2, rejected={3: "slow", 4: "odd"}, promoted={2: 6}, answered=(1, 9), updated_s=6.0)
    joined = own.with_verdicts_of(other)
    assert joined == ChannelStatus(
        serving=1,
        rejected={3: "slow", 4: "odd"},
        promoted={1: 1, 2: 6},
        answered=(1, 2, 6, 9),
        problem="down",
        updated_s=5.0,
    )
    assert joined.with_verdicts_of(other) == joined
    again = other.with_verdicts_of(own).with_verdicts_of(joined)
    assert (again.rejected, again.promoted, again.answered) == (joined.rejected, joined.promoted, joined.answered)


@pytest.mark.parametrize(
    ("own", "other", "joined"),
    [
        (None, (1, "passed"), (1, "passed")),
        ((1, "watched"), (1, "rejected"), (1, "rejected")),
        ((1, "passed"), (1, "rejected"), (1, "passed")),
        ((2, "watched"), (1, "passed"), (2, "watched")),
        ((1, "passed"), (2, "watched"), (1, "passed")),  # no replica of this one's has it
        (None, (1, "watched"), None),
        ((1, "passed"), None, (1, "passed")),
    ],
)
def test_a_canary_that_another_has_judged_is_judged(own: Any, other: Any, joined: Any) -> None:
    def status(canary: Any) -> ChannelStatus:
        if canary is None:
            return ChannelStatus()
        entry, phase = canary
        return ChannelStatus(canary=CanaryStatus(entry=entry, version=7, weight=0.1, since_s=1.0, phase=phase))

    assert status(own).with_verdicts_of(status(other)).canary == status(joined).canary


def test_a_status_without_what_has_answered_is_read(store: MemoryStore) -> None:
    before = ChannelStatus(serving=1, rejected={2: "NaN"})
    document = before.model_dump(mode="json", exclude={"answered"})
    store.put_status(layout.channel_status("lm", "production"), document)
    assert channels.read_status(store, "lm", "production") == before


@pytest.mark.parametrize("data", [b"x", b"[1]", b"{}", b'{"number": 1, "version": 0}'])
def test_what_is_not_an_entry_is_refused_and_passed_over(store: MemoryStore, data: bytes) -> None:
    store.upload(layout.channel_entry("lm", "production", 1), data)
    with pytest.raises(IntegrityError, match=r"channels/production/00001\.json"):
        channels.read_entry(store, "lm", "production", 1)
    assert channels.newest(store, "lm", "production") is None
    found = channels.history(store, "lm", "production")
    assert (found.entries, len(found.damaged), found.last_number) == ((), 1, 1)


def test_an_entry_under_another_number_is_refused_and_passed_over(store: MemoryStore) -> None:
    first = append(store, 1)
    store.upload(layout.channel_entry("lm", "production", 2), store.get(layout.channel_entry("lm", "production", 1)))
    with pytest.raises(IntegrityError, match="says that it is entry 1"):
        channels.read_entry(store, "lm", "production", 2)
    assert channels.newest(store, "lm", "production") == first
    assert append(store, 2).number == 3


def test_a_damaged_status_is_passed_over_by_those_who_only_ask(store: MemoryStore) -> None:
    store.put_status(layout.channel_status("lm", "production"), {"format": "nothing"})
    with pytest.raises(IntegrityError):
        channels.read_status(store, "lm", "production")
    assert channels.readable_status(store, "lm", "production") is None
