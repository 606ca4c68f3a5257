"""Each fault does what it says, and the store gets over it or says so."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.errors import AlreadyExists, HeadwayError, IntegrityError, StoreError
from orchestrator.store import Store
from orchestrator.store.s3 import PART_BYTES
from orchestrator.targets.seaweedfs import S3Server
from tests.conftest import IS_FULL
from tests.faults.conftest import HASTY, STEADY, behind
from tests.faults.proxy import Fault, FaultProxy, Kind, random_fault

SMALL = random.Random(1).randbytes(10_000)
LARGE = random.Random(2).randbytes(PART_BYTES + 100_000)


@dataclass(frozen=True)
class Operation:
    """Something done through the proxy (``act``), and what must be so afterwards, seen past it (``ended_well``)."""

    act: Callable[[Store], object]
    ended_well: Callable[[Store, object], bool]
    method: str
    query: str = ""
    has_request_body: bool = True
    has_answer_body: bool = False


def chunks(data: bytes, size: int = 1_000_000) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def holds(key: str, data: bytes) -> Callable[[Store, object], bool]:
    return lambda store, _: store.get(key) == data


OPERATIONS = {
    "get": Operation(
        lambda store: store.get("held"),
        lambda _, got: got == SMALL,
        "GET",
        has_request_body=False,
        has_answer_body=True,
    ),
    "get_range": Operation(
        lambda store: store.get_range("held", 100, 5000),
        lambda _, got: got == SMALL[100:5100],
        "GET",
        has_request_body=False,
        has_answer_body=True,
    ),
    "list": Operation(
        lambda store: [item.key for item in store.list("")],
        lambda _, got: got == ["held", "other"],
        "GET",
        "list-type",
        has_request_body=False,
        has_answer_body=True,
    ),
    "upload small": Operation(lambda store: store.upload("new", SMALL), holds("new", SMALL), "PUT"),
    "upload a part": Operation(
        lambda store: store.upload("new", memoryview(LARGE)), holds("new", LARGE), "PUT", "partNumber"
    ),
    "complete a multipart": Operation(
        lambda store: store.upload("new", LARGE), holds("new", LARGE), "POST", "uploadId", has_answer_body=True
    ),
    "create": Operation(lambda store: store.create("new", SMALL), holds("new", SMALL), "PUT"),
    "stream a part": Operation(
        lambda store: store.upload_stream("new", chunks(LARGE)), holds("new", LARGE), "PUT", "partNumber"
    ),
    "complete a stream": Operation(
        lambda store: store.upload_stream("new", chunks(LARGE)),
        holds("new", LARGE),
        "POST",
        "uploadId",
        has_answer_body=True,
    ),
    "stream small": Operation(lambda store: store.upload_stream("new", chunks(SMALL)), holds("new", SMALL), "PUT"),
    "delete": Operation(
        lambda store: store.delete(["held"]),
        lambda store, _: not store.exists("held"),
        "POST",
        "delete",
        has_answer_body=True,
    ),
}

PASSING = [
    Fault(kind=Kind.CUT_BEFORE),
    Fault(kind=Kind.CUT_REQUEST, at_bytes=50),
    Fault(kind=Kind.LOSE_ANSWER),
    Fault(kind=Kind.CUT_ANSWER),
    Fault(kind=Kind.CUT_ANSWER, at_bytes=60),
    Fault(kind=Kind.STALL, at_bytes=60, wait_s=0.8),
    Fault(kind=Kind.DELAY, wait_s=0.7),
    Fault(kind=Kind.REFUSE, status=500),
    Fault(kind=Kind.REFUSE, status=503),
]


HARMFUL = [
    Fault(kind=Kind.FLIP_REQUEST, at_bytes=40),
    Fault(kind=Kind.FLIP_ANSWER, at_bytes=3),
    Fault(kind=Kind.REFUSE, status=409),
    Fault(kind=Kind.REFUSE, status=412),
]


def cases(faults: list[Fault]) -> list[object]:
    """Every operation with every fault that can befall it; in quick runs each fault with one of them, in turns."""
    found: dict[Fault, list[object]] = {fault: [] for fault in faults}
    for name, operation in OPERATIONS.items():
        for fault in faults:
            if (operation.has_answer_body or fault.kind not in (Kind.STALL, Kind.CUT_ANSWER, Kind.FLIP_ANSWER)) and (
                operation.has_request_body or fault.kind is not Kind.FLIP_REQUEST
            ):
                met = replace(fault, method=operation.method, query=operation.query)
                found[fault].append(pytest.param(name, met, id=f"{name}-{fault}"))
    if IS_FULL:
        return [case for some in found.values() for case in some]
    return [some[number % len(some)] for number, some in enumerate(found.values())]


@pytest.mark.parametrize(("name", "fault"), cases(PASSING))
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(
    store: Store, proxy: FaultProxy, name: str, fault: Fault
) -> None:
    operation = OPERATIONS[name]
    through = behind(proxy, store, HASTY if fault.wait_s else STEADY)
    store.upload("held", SMALL)
    store.upload("other", SMALL)
    proxy.add(fault)
    got = operation.act(through)
    assert operation.ended_well(store, got)
    assert [request.fault for request in proxy.requests].count(fault) == 1
    assert through.retries >= (fault.kind is not Kind.DELAY)
    assert list(store.unfinished_uploads("")) == []


def test_a_multipart_whose_name_was_lost_is_left_for_collection(
    store: Store, through: Store, proxy: FaultProxy
) -> None:
    proxy.add(Fault(kind=Kind.LOSE_ANSWER, method="POST", query="uploads"))
    through.upload("new", memoryview(LARGE), max_concurrency=2)
    assert store.get("new") == LARGE
    (left,) = store.unfinished_uploads("")
    store.abort_upload(left)
    assert list(store.unfinished_uploads("")) == []


@pytest.mark.parametrize(("name", "fault"), cases(HARMFUL))
def test_a_fault_that_lies_ends_well_or_in_an_error_of_ours(
    store: Store, through: Store, proxy: FaultProxy, name: str, fault: Fault
) -> None:
    operation = OPERATIONS[name]
    store.upload("held", SMALL)
    store.upload("other", SMALL)
    proxy.add(fault)
    try:
        got = operation.act(through)
    except HeadwayError:
        assert not store.exists("new") or store.get("new") in (SMALL, LARGE)
    else:
        seen_flipped = name in ("get", "get_range") and fault.kind is Kind.FLIP_ANSWER and got != SMALL
        assert seen_flipped or operation.ended_well(store, got)
    assert [request.fault for request in proxy.requests].count(fault) == 1


def test_damage_in_a_read_is_found_by_the_digest(store: Store, through: Store, proxy: FaultProxy) -> None:
    store.upload("held", SMALL)
    digest = hashlib.sha256(SMALL).hexdigest()
    proxy.add(Fault(kind=Kind.FLIP_ANSWER, method="GET", at_bytes=7, times=100))
    got = through.get_range("held", 0, 100)
    assert [index for index in range(100) if got[index] != SMALL[index]] == [7]
    with pytest.raises((IntegrityError, StoreError)):
        through.get_verified("held", sha256=digest, size_bytes=len(SMALL))


@pytest.mark.parametrize(
    ("fault", "is_there"),
    [
        (Fault(kind=Kind.CUT_BEFORE), False),
        (Fault(kind=Kind.CUT_REQUEST, at_bytes=5000), False),
        (Fault(kind=Kind.LOSE_ANSWER), True),
        (Fault(kind=Kind.REFUSE, status=500), False),
        (Fault(kind=Kind.REFUSE, status=503), False),
        (Fault(kind=Kind.REFUSE, status=409), False),
        (Fault(kind=Kind.REFUSE, status=412), False),
        (Fault(kind=Kind.FLIP_REQUEST, at_bytes=5000), False),
    ],
    ids=str,
)
def test_what_a_fault_leaves_at_the_server(
    store: Store, once: Store, proxy: FaultProxy, fault: Fault, is_there: bool
) -> None:
    proxy.add(fault)
    with pytest.raises(StoreError):
        once.upload("new", SMALL)
    assert store.exists("new") is is_there
    assert [request.fault for request in proxy.requests] == [fault]
    assert once.retries == 0


@pytest.mark.parametrize("kind", [Kind.CUT_ANSWER, Kind.STALL])
def test_a_body_that_ends_early_is_never_taken_for_the_whole(store: Store, proxy: FaultProxy, kind: Kind) -> None:
    once = behind(proxy, store, replace(HASTY if kind is Kind.STALL else STEADY, attempts=1))
    store.upload("held", SMALL)
    proxy.add(Fault(kind=kind, at_bytes=9000, wait_s=0.8 if kind is Kind.STALL else 0.0, times=3))
    with pytest.raises(StoreError, match="held"):
        once.get("held")
    with pytest.raises(StoreError, match="held"):
        once.get_range("held", 0, 9500)
    assert [request.status for request in proxy.requests] == [200, 206]


def test_an_outage_ends_in_an_error_after_all_attempts(through: Store, proxy: FaultProxy) -> None:
    proxy.add(Fault(kind=Kind.REFUSE, status=500, times=100))
    with pytest.raises(StoreError, match="InternalError"):
        through.get("key")
    assert [request.status for request in proxy.requests] == [500] * 4
    assert through.retries == 3


def test_a_listing_that_ends_before_its_first_byte_is_not_an_empty_one(
    store: Store, once: Store, proxy: FaultProxy
) -> None:
    store.upload("held", b"x")
    proxy.add(Fault(kind=Kind.CUT_ANSWER, query="list-type", at_bytes=0))
    with pytest.raises(StoreError):
        list(once.list(""))


def test_a_rule_chooses_by_method_key_query_and_count(store: Store, once: Store, proxy: FaultProxy) -> None:
    store.upload("a/held", b"x")
    store.upload("b/held", b"x")
    proxy.add(Fault(kind=Kind.REFUSE, status=500, method="GET", key=r"/b/h\w+$", nth=2, times=2))
    seen = []
    for key in ("b/held", "a/held", "b/held", "b/held", "b/held"):
        try:
            seen.append(once.get(key))
        except StoreError:
            seen.append(b"")
    assert seen == [b"x", b"x", b"", b"", b"x"]
    proxy.clear()
    assert once.get("b/held") == b"x"
    assert [(request.method, request.status, request.fault) for request in proxy.requests] == [("GET", 200, None)]


def test_a_create_whose_answer_and_read_back_were_lost_is_a_win(
    store: Store, through: Store, proxy: FaultProxy
) -> None:
    proxy.add(Fault(kind=Kind.LOSE_ANSWER, method="PUT"), Fault(kind=Kind.CUT_ANSWER, method="GET", times=2))
    through.create("claim", b"nonce 1")
    assert store.get("claim") == b"nonce 1"
    assert [(request.method, request.status) for request in proxy.requests] == [
        ("PUT", 200),
        ("PUT", 412),
        *[("GET", 200)] * 3,
    ]
    proxy.clear()
    proxy.add(Fault(kind=Kind.LOSE_ANSWER, method="PUT"))
    with pytest.raises(AlreadyExists):
        through.create("claim", b"nonce 2")


@pytest.mark.parametrize("name", ["complete a multipart", "complete a stream"])
def test_an_upload_that_the_server_forgot_after_completing_it_is_a_success(
    store: Store, through: Store, proxy: FaultProxy, name: str
) -> None:
    operation = OPERATIONS[name]
    proxy.add(
        Fault(kind=Kind.LOSE_ANSWER, method="POST", query="uploadId"),
        Fault(kind=Kind.REFUSE, status=404, method="POST", query="uploadId", nth=2),
    )
    assert operation.ended_well(store, operation.act(through))
    store.delete(["new"])
    proxy.clear()
    proxy.add(Fault(kind=Kind.REFUSE, status=404, method="POST", query="uploadId"))
    with pytest.raises(StoreError):
        operation.act(through)


def test_requests_can_be_slow_and_fail_by_chance(store: Store, s3: S3Server) -> None:
    store.upload("held", SMALL)
    kinds = []
    for _ in range(2):
        with FaultProxy(s3.endpoint_url, seed=7) as proxy:
            reader = behind(proxy, store, STEADY)
            proxy.failing_share = 0.3
            assert all(reader.get("held") == SMALL for _ in range(20))
            kinds.append([str(request.fault) for request in proxy.requests])
            assert reader.retries == sum(fault != "None" for fault in kinds[-1]) > 0
            proxy.failing_share, proxy.latency_s = 0.0, 0.1
            began = time.monotonic()
            reader.get("held")
            assert time.monotonic() - began >= 0.1
    assert kinds[0] == kinds[1]


def test_many_clients_at_once_each_get_their_own_bytes(store: Store, through: Store, proxy: FaultProxy) -> None:
    bodies = {f"data/{index}": random.Random(index).randbytes(2**20 + index) for index in range(16)}
    proxy.failing_share = 0.1
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(through.upload, bodies, bodies.values()))
        assert list(pool.map(through.get, bodies)) == list(bodies.values())
    assert sorted(item.key for item in through.list("data/")) == sorted(bodies)


def test_a_file_survives_faults_in_its_download(
    store: Store, through: Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    store.upload("large", LARGE)
    proxy.add(
        Fault(kind=Kind.CUT_ANSWER, method="GET", at_bytes=2**19),
        Fault(kind=Kind.LOSE_ANSWER, method="GET"),
        Fault(kind=Kind.REFUSE, status=503, method="HEAD"),
    )
    through.download("large", tmp_path / "large", sha256=hashlib.sha256(LARGE).hexdigest())
    assert (tmp_path / "large").read_bytes() == LARGE


def test_random_faults_are_of_every_kind_and_tell_what_they_do() -> None:
    faults = [random_fault(random.Random(seed)) for seed in range(200)]
    assert faults == [random_fault(random.Random(seed)) for seed in range(200)]
    assert {fault.kind for fault in faults} == set(Kind)
    assert all(str(fault.kind) in str(fault) for fault in faults)
    cut = Fault(kind=Kind.CUT_ANSWER, method="GET", key="rank-0", nth=3, at_bytes=1024)
    assert str(cut) == "request 3 of GET key ~ 'rank-0' is cut in the answer's body at 1,024 bytes"


@pytest.mark.parametrize("status", [0, 200])
def test_a_refusal_has_a_status_that_the_proxy_can_answer(status: int) -> None:
    with pytest.raises(ValueError, match="status is one of"):
        Fault(kind=Kind.REFUSE, status=status)
