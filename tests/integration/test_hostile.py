"""Requests that mean harm, against the real application: 4xx or 429, memory bounded, and it goes on answering."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator.store import open_store
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.conftest import BUCKET
from tests.integration.serving import promote, ray_with_serve, replica_pids, serving, wait_for
from tests.tiny_model import release_version, save_model

MODEL = "hostile-lm"
NUM_CONNECTIONS = 1000
NUM_SLOW = 200
MOST_GROWTH_BYTES = 300 * 2**20
ANSWER_WITHIN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Served:
    url: str
    pid: int
    """Of the one replica."""

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"process {self.pid} has no memory")

    def assert_answers(self) -> None:
        body = {"model": MODEL, "prompt": "def", "max_tokens": 4}
        answer = httpx.post(self.completions, json=body, timeout=ANSWER_WITHIN_S)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def served(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ray_with_serve(tmp_path_factory.mktemp("cache")) as port:
        from ray import serve

        from workloads.serve.app import build

        store = open_store(f"s3://{BUCKET}/hostile")
        directory = save_model(tmp_path_factory.mktemp("models") / "one", seed=1)
        promote(store, MODEL, release_version(store, MODEL, directory).number)
        serve.run(build({"model": MODEL, "store": store.uri, "poll_s": 0.2}), name="hostile", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: serving(url) == 1)
        (pid,) = replica_pids("hostile")
        found = Served(url=url, pid=pid)
        found.assert_answers()
        yield found


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 1_000_000}, "n"),
        ({"n": -1}, "n"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"prompt": ["x"] * 100_000}, "prompt"),
        ({"prompt": [[1] * 100_000]}, "prompt"),
        ({"prompt": "x " * 200_000}, "prompt"),
        ({"temperature": 1e300}, "temperature"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"logit_bias": {"1": 100}}, "logit_bias"),
        ({"__class__": "x"}, None),
    ],
)
def test_arguments_out_of_bounds_are_named(served: Served, change: dict[str, Any], param: str | None) -> None:
    body = {"model": MODEL, "prompt": "def", "max_tokens": 4, **change}
    answer = httpx.post(served.completions, json=body, timeout=ANSWER_WITHIN_S)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert (error["param"] or "").split(".")[0] == param, error
    assert len(answer.content) < 2000
    served.assert_answers()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "hostile-lm", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "hostile-lm", "prompt": "\\ud800"}', 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"model": "hostile-lm", "prompt": NaN}', 400),
        (b"", 400),
        (json.dumps({"model": MODEL, "prompt": "x" * (10 * 2**20)}).encode(), 413),
    ],
)
def test_bodies_that_are_no_request(served: Served, body: bytes, status: int) -> None:
    before = served.resident_bytes()
    for _ in range(5):
        answer = httpx.post(served.completions, content=body, timeout=ANSWER_WITHIN_S)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert served.resident_bytes() - before < MOST_GROWTH_BYTES
    served.assert_answers()


def test_a_body_that_never_ends_is_cut_off(served: Served) -> None:
    """64 MiB in pieces without a length; the answer may come before all of it was sent."""
    before = served.resident_bytes()

    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**20

    with suppress(httpx.TransportError):  # where the connection is closed on the sender
        assert httpx.post(served.completions, content=pieces(), timeout=ANSWER_WITHIN_S).status_code == 413
    assert served.resident_bytes() - before < MOST_GROWTH_BYTES
    served.assert_answers()


def test_slow_senders_keep_nobody_waiting(served: Served) -> None:
    """Connections that send a header, or a body, a byte at a time."""
    address = (urlsplit(served.url).hostname, urlsplit(served.url).port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
    with ExitStack() as connections:
        slow = []
        for number in range(NUM_SLOW):
            connection = connections.enter_context(socket.create_connection(address, timeout=5))
            connection.sendall(head if number % 2 else head + b'\r\n{"model": ')
            slow.append(connection)
        for _ in range(5):
            for connection in slow:
                connection.send(b" " if connection is slow[0] else b"x")
            began_s = time.monotonic()
            served.assert_answers()
            assert time.monotonic() - began_s < ANSWER_WITHIN_S / 3
    served.assert_answers()


def test_a_thousand_connections_at_once(served: Served) -> None:
    before = served.resident_bytes()
    body = {"model": MODEL, "prompt": "def", "max_tokens": 8}

    async def ask(client: httpx.AsyncClient) -> int:
        answer = await client.post(served.completions, json=body)
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded", answer.text
            assert answer.headers["retry-after"]
        return answer.status_code

    async def ask_all() -> Counter[int]:
        limits = httpx.Limits(max_connections=NUM_CONNECTIONS)
        async with httpx.AsyncClient(limits=limits, timeout=500) as client:
            return Counter(await asyncio.gather(*(ask(client) for _ in range(NUM_CONNECTIONS))))

    statuses = asyncio.run(ask_all())
    print(f"\n{NUM_CONNECTIONS} requests at once: {dict(statuses)}")
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 0
    assert served.resident_bytes() - before < MOST_GROWTH_BYTES
    served.assert_answers()
    wait_for(lambda: httpx.get(f"{served.url}/healthz", timeout=60).json()["num_sequences"] == 0)
