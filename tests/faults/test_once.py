"""Uploads that may be done once: what is there stays, and only what is really there counts as done."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest

from orchestrator.errors import AlreadyExists
from orchestrator.store import Store
from orchestrator.store.s3 import PART_BYTES
from tests.faults.conftest import HASTY, STEADY, behind
from tests.faults.proxy import Fault, FaultProxy, Kind, Request

SMALL = random.Random(1).randbytes(10_000)
LARGE = random.Random(2).randbytes(PART_BYTES + 1000)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "by parts"])
def test_what_is_there_stays(store: Store, data: bytes) -> None:
    store.upload_stream("new", [data], once=True)
    (before,) = store.list("new")
    store.upload_stream("new", [bytes(len(data))], once=True)
    assert list(store.list("new")) == [before]
    assert store.get("new") == data
    assert list(store.unfinished_uploads("")) == []


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "by parts"])
def test_bytes_stay_too(store: Store, data: bytes) -> None:
    store.upload("new", data, once=True)
    (before,) = store.list("new")
    store.upload("new", bytes(len(data)), once=True)
    assert list(store.list("new")) == [before]


def test_what_another_kind_of_write_left_is_no_success(store: Store) -> None:
    store.create("new", SMALL)
    with pytest.raises(AlreadyExists):
        store.upload("new", SMALL, once=True)
    with pytest.raises(AlreadyExists):
        store.upload_stream("new", [SMALL], once=True)


def test_an_object_that_is_said_to_exist_is_looked_for(store: Store, proxy: FaultProxy) -> None:
    through = behind(proxy, store, STEADY)
    proxy.add(Fault(kind=Kind.REFUSE, status=412, method="PUT", times=2))
    with pytest.raises(AlreadyExists):
        through.upload("new", SMALL, once=True)
    with pytest.raises(AlreadyExists):
        through.upload_stream("new", [SMALL], once=True)
    assert not store.exists("new")


def test_a_lost_answer_is_a_success(store: Store, proxy: FaultProxy) -> None:
    proxy.add(Fault(kind=Kind.LOSE_ANSWER, method="PUT"))
    behind(proxy, store, STEADY).upload_stream("new", [SMALL], once=True)
    assert store.get("new") == SMALL
    assert [request.status for request in proxy.requests if request.method == "PUT"] == [200, 412]


def test_a_request_that_comes_after_its_retry_changes_nothing(store: Store, proxy: FaultProxy) -> None:
    through = behind(proxy, store, replace(HASTY, attempts=12))
    retried = threading.Event()

    def hold(_: Request) -> None:
        retried.wait(60)

    proxy.when_met = hold
    proxy.add(Fault(kind=Kind.DELAY, method="PUT"))
    through.upload_stream("new", [SMALL], once=True)
    (before,) = store.list("new")
    late = proxy.requests[0]
    assert late.status is None
    retried.set()
    while late.status is None:  # the proxy sends it on now
        store.exists("new")
    assert late.status == 412
    assert list(store.list("new")) == [before]
