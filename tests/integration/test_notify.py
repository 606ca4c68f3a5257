"""Webhooks that answer, fail, lead elsewhere, or are not there: a real HTTP server, and what it was sent."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.errors import StoreError
from orchestrator.record import notice
from orchestrator.record.notice import Notice, signature
from orchestrator.record.notify import TIMEOUT_S, WAITS_S, Delivery, notify
from orchestrator.release.outcome import Outcome
from orchestrator.spec import NotifySpec
from orchestrator.store import Store, layout
from orchestrator.targets.ports import choose
from tests.integration.receiver import PATH, Receiver, listening
from tests.unit.fakes import MemoryStore
from tests.unit.serve.test_rejections import put_version
from workloads.serve.rejections import in_background

RUN = "demo-1a2b3c4d"
DONE = notice.of_outcome(Outcome(run_id=RUN, state="done", attempt=1, facts={"version": "demo@1"}, ended_s=1.0))
STALLED = notice.stalled(RUN, 1, step=4, seconds=1800.0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with listening(Receiver()) as found:
        yield found


@pytest.fixture
def memory_store() -> MemoryStore:
    return MemoryStore(prefix="headway")


def told(
    store: Store,
    url: str,
    what: Notice = DONE,
    *,
    waits: list[float] | None = None,
    timeout_s: float = TIMEOUT_S,
    **environ: str,
) -> Delivery | None:
    wait = (waits if waits is not None else []).append
    return notify(NotifySpec(webhook=url), what, store, environ=environ, timeout_s=timeout_s, wait=wait)


def test_it_is_posted_once_with_its_facts(receiver: Receiver, memory_store: MemoryStore) -> None:
    delivery = told(memory_store, receiver.url)
    assert delivery == Delivery(event="done", host="127.0.0.1", delivered=True, tries=1)
    assert told(memory_store, receiver.url) is None
    ((headers, body),) = receiver.got
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Headway-Event"] == "done"
    assert "Headway-Signature" not in headers
    assert json.loads(body)["text"].startswith(f"{RUN} is done: demo@1")
    claim = memory_store.get_json(layout.notice(RUN, "done"))
    assert (claim["event"], claim["host"]) == ("done", "127.0.0.1")


def test_it_is_signed_where_there_is_a_secret(receiver: Receiver, memory_store: MemoryStore) -> None:
    told(memory_store, receiver.url, HEADWAY_WEBHOOK_SECRET="shared")
    ((headers, body),) = receiver.got
    assert headers["Headway-Signature"] == signature(body, "shared")


def test_other_events_are_claimed_apart(receiver: Receiver, memory_store: MemoryStore) -> None:
    assert told(memory_store, receiver.url, STALLED)
    assert told(memory_store, receiver.url, DONE)
    assert [body["event"] for body in receiver.bodies()] == ["stalled", "done"]


def test_what_the_settings_leave_out_is_not_told(receiver: Receiver, memory_store: MemoryStore) -> None:
    settings = NotifySpec(webhook=receiver.url, events=("failed",))
    assert notify(settings, DONE, memory_store, environ={}) is None
    assert notify(None, DONE, memory_store, environ={}) is None
    assert memory_store.objects == {}
    assert receiver.got == []


def test_of_many_senders_one_tells(receiver: Receiver, store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: told(store, receiver.url), range(8)))
    assert len([answer for answer in answers if answer is not None]) == len(receiver.got) == 1


def test_a_passing_fault_is_waited_for(receiver: Receiver, memory_store: MemoryStore) -> None:
    receiver.statuses = [500, 429]
    waits: list[float] = []
    delivery = told(memory_store, receiver.url, waits=waits)
    assert delivery == Delivery(event="done", host="127.0.0.1", delivered=True, tries=3)
    assert waits == list(WAITS_S)
    assert len({body for _, body in receiver.got}) == 1


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (404, 1), (400, 1)])
def test_a_refusal_is_named(receiver: Receiver, memory_store: MemoryStore, status: int, tries: int) -> None:
    receiver.statuses = [status] * 3
    delivery = told(memory_store, receiver.url)
    assert delivery is not None
    assert (delivery.delivered, delivery.tries, delivery.error) == (False, tries, f"it answered {status}")
    assert len(receiver.got) == tries


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(receiver: Receiver, memory_store: MemoryStore, status: int) -> None:
    with listening(Receiver()) as elsewhere:
        receiver.statuses, receiver.location = [status], elsewhere.url
        delivery = told(memory_store, receiver.url)
        assert elsewhere.got == []
    assert delivery is not None
    assert (delivery.delivered, delivery.tries) == (False, 1)
    assert "redirect" in delivery.error


def test_a_receiver_that_does_not_answer_is_given_up(receiver: Receiver, memory_store: MemoryStore) -> None:
    receiver.is_slow = True
    delivery = told(memory_store, receiver.url, timeout_s=0.2)
    assert delivery is not None
    assert (delivery.delivered, delivery.tries) == (False, 3)
    assert "Timeout" in delivery.error


def test_a_receiver_that_is_down_is_named(memory_store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    delivery = told(memory_store, f"http://127.0.0.1:{choose([], taken=[], seed=7)}{PATH}", waits=waits)
    assert delivery is not None
    assert (delivery.delivered, delivery.tries) == (False, 3)
    assert waits == list(WAITS_S)
    assert f"The webhook at 127.0.0.1 was not told that {RUN} is done" in caplog.text


def test_the_address_is_written_down_nowhere(
    receiver: Receiver, memory_store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [200, 404]
    with caplog.at_level(logging.DEBUG):
        deliveries = [told(memory_store, receiver.url, what) for what in (DONE, STALLED)]
    for text in (caplog.text, str(deliveries), str(memory_store.objects)):
        assert "not-for-logs" not in text


def test_an_address_may_be_in_a_variable(receiver: Receiver, memory_store: MemoryStore) -> None:
    settings = NotifySpec(webhook_env="ALERTS")
    delivery = notify(settings, STALLED, memory_store, environ={"ALERTS": receiver.url})
    assert delivery is not None
    assert delivery.delivered


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "the variable ALERTS is not set"),
        ({"ALERTS": "http://example.com/hook"}, "the variable ALERTS must be an https:// address"),
        ({"ALERTS": "https://[::1"}, "the variable ALERTS "),
    ],
)
def test_a_variable_without_an_address_is_named(memory_store: MemoryStore, environ: dict[str, str], words: str) -> None:
    delivery = notify(NotifySpec(webhook_env="ALERTS"), DONE, memory_store, environ=environ)
    assert delivery is not None
    assert (delivery.delivered, delivery.tries) == (False, 0)
    assert words in delivery.error
    assert memory_store.objects == {}  # once it is mended, the next attempt tells


def test_a_rejection_reaches_the_webhook_of_the_run_that_made_the_version(
    receiver: Receiver, memory_store: MemoryStore
) -> None:
    run_id = put_version(memory_store, {"notify": {"webhook": receiver.url}})
    tell = in_background(memory_store, "lm", "production")
    for _ in range(2):  # as after a restart of the server
        tell(1, "odd weights")
        for thread in [each for each in threading.enumerate() if each.name == "rejection"]:
            thread.join(30.0)
    (body,) = receiver.bodies()
    assert (body["event"], body["run_id"], body["version"]) == ("rejected", run_id, "lm@1")
    assert memory_store.exists(layout.notice(run_id, "rejected-00001-production"))


def test_a_store_that_is_down_ends_nothing(receiver: Receiver, memory_store: MemoryStore) -> None:
    memory_store.fail["create"] = StoreError("down")
    delivery = told(memory_store, receiver.url)
    assert delivery is not None
    assert (delivery.delivered, delivery.error, receiver.got) == (False, "down", [])
