"""An HTTP proxy in front of an S3 server that does to chosen requests what a :class:`Fault` says.

One thread serves a client's connection and holds one connection to the server. The Host header goes through as it came,
because the client's signature covers it. Chunked bodies go on with their length instead, so that offsets mean the same.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from random import Random
from urllib.parse import unquote, urlsplit

from tests.faults.fault import CODES, Fault, Kind, passing_fault, random_fault

__all__ = ["CODES", "Fault", "FaultProxy", "Kind", "Request", "passing_fault", "random_fault"]

BLOCK_BYTES = 256 * 2**10


@dataclass
class Request:
    """A request that came by, and what became of it."""

    method: str
    key: str
    """Without the bucket, with the store's prefix; empty for what is asked of the bucket."""
    query: str
    status: int | None = None
    """What the server answered, or the proxy in its place; None where no answer came."""
    fault: Fault | None = None
    """What was done to it."""


class FaultProxy:
    """The proxy, on a port of 127.0.0.1 that any process may use::

    with FaultProxy(server.endpoint_url) as proxy:
        proxy.add(Fault(kind=Kind.LOSE_ANSWER, method="PUT", key="manifest.json$"))
        … AWS_ENDPOINT_URL=proxy.endpoint_url …
    """

    latency_s: float = 0.0
    """Every request waits for this long before it goes on."""
    failing_share: float = 0.0
    """This share of the requests meets a :func:`passing_fault`, drawn from ``seed``."""
    when_met: Callable[[Request], None] | None = None
    """Called when a request meets its fault, before the fault takes its course: the request waits until it returns."""

    def __init__(self, upstream_url: str, *, seed: int = 0) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._rng = Random(seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._faults: list[Fault] = []
        self._num_matched: list[int] = []
        self._requests: list[Request] = []
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def requests(self) -> list[Request]:
        """All requests since the last :meth:`clear`, in the order in which they came."""
        with self._lock:
            return list(self._requests)

    def add(self, *faults: Fault) -> None:
        """Requests from now on meet these. A request that several faults choose meets the one that was added first."""
        with self._lock:
            self._faults += faults
            self._num_matched += [0] * len(faults)

    def clear(self) -> None:
        """Forget all faults and requests."""
        with self._lock:
            self._faults, self._num_matched, self._requests = [], [], []

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._lock:
            held = [self._listener, *self._open]
        for one in held:
            _hang_up(one)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name="fault-proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Carry one client's requests, one after the other, until either side or a fault ends it."""
        try:
            with self._held(client), self._held(socket.create_connection(self._upstream)) as server:
                from_client, from_server = (one.makefile("rb") for one in (client, server))
                with from_client, from_server:
                    while head := Head.read(from_client):
                        self._carry(head, Side(client, from_client), Side(server, from_server))
        except (OSError, Cut):
            pass

    @contextlib.contextmanager
    def _held(self, one: socket.socket) -> Iterator[socket.socket]:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(one)
        try:
            yield one
        finally:
            with self._lock:
                self._open.discard(one)
            _hang_up(one)

    def _carry(self, head: Head, client: Side, server: Side) -> None:
        request, fault = self._choose(head)
        kind = fault.kind if fault else None
        self._wait(self.latency_s)
        if fault and kind is Kind.DELAY:
            self._meet(request, fault)
            self._wait(fault.wait_s)
        if fault and kind is Kind.CUT_BEFORE:
            self._meet(request, fault)
            raise Cut
        if head.get("expect"):
            client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = client.body(head)
        if fault and kind is Kind.REFUSE:
            self._meet(request, fault)
            request.status = fault.status
            for _ in body:
                pass
            client.socket.sendall(_refusal(fault.status, with_body=request.method != "HEAD"))
            return
        self._send(head.without("expect"), body, server, fault if kind in _IN_REQUEST else None, request)
        answer = Head.read(server.file)
        while answer and answer.status == 100:
            answer = Head.read(server.file)
        if answer is None:
            raise Cut
        body = server.body(answer, bodiless=request.method == "HEAD")
        request.status = answer.status
        if fault and kind is Kind.LOSE_ANSWER:
            self._meet(request, fault)
            raise Cut
        self._send(answer, body, client, fault if kind in _IN_ANSWER else None, request)

    def _choose(self, head: Head) -> tuple[Request, Fault | None]:
        """Record the request, and what is to be done to it."""
        method, target, _ = head.start.split(" ", 2)
        path, _, query = target.partition("?")
        request = Request(method, unquote(path).lstrip("/").partition("/")[2], query)
        chosen = None
        with self._lock:
            self._requests.append(request)
            for index, fault in enumerate(self._faults):
                if fault.matches(method, request.key, query):
                    self._num_matched[index] += 1
                    if chosen is None and fault.nth <= self._num_matched[index] < fault.nth + fault.times:
                        chosen = fault
            if chosen is None and self._rng.random() < self.failing_share:
                chosen = passing_fault(self._rng)
        return request, chosen

    def _meet(self, request: Request, fault: Fault) -> None:
        request.fault = fault
        if self.when_met:
            self.when_met(request)

    def _send(self, head: Head, body: Body, to: Side, fault: Fault | None, request: Request) -> None:
        """Head and body, with the fault in the body."""
        to.socket.sendall(head.with_length(body.num_bytes) if body.was_chunked else head.encoded())
        at = min(fault.at_bytes, body.num_bytes - 1) if fault else -1
        if fault and fault.kind in _CUTS and body.num_bytes == 0:
            self._meet(request, fault)
            raise Cut
        sent = 0
        for block in body:
            if not (fault and sent <= at < sent + len(block)):
                to.socket.sendall(block)
            else:
                self._meet(request, fault)
                self._break(fault, block, at - sent, to)
            sent += len(block)

    def _break(self, fault: Fault, block: bytearray, at: int, to: Side) -> None:
        """Send a block with what the fault does at byte ``at`` of it."""
        if fault.kind in (Kind.FLIP_REQUEST, Kind.FLIP_ANSWER):
            block[at] ^= 0xFF
            to.socket.sendall(block)
            return
        to.socket.sendall(block[:at])
        if fault.kind is not Kind.STALL:
            raise Cut
        self._wait(fault.wait_s)
        to.socket.sendall(block[at:])

    def _wait(self, seconds: float) -> None:
        if seconds > 0 and self._closing.wait(seconds):
            raise Cut


_CUTS = (Kind.CUT_REQUEST, Kind.CUT_ANSWER)
_IN_REQUEST = (Kind.CUT_REQUEST, Kind.FLIP_REQUEST)
_IN_ANSWER = (Kind.CUT_ANSWER, Kind.FLIP_ANSWER, Kind.STALL)


class Cut(Exception):
    """Both connections end here."""


@dataclass(frozen=True)
class Head:
    """A request's or an answer's first line and headers, as they came."""

    start: str
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, file: BufferedReader) -> Head | None:
        """The next head; None where the other side has hung up."""
        start = file.readline().decode("latin-1").strip()
        headers = []
        while line := file.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers.append((name, value.strip()))
        return cls(start, tuple(headers)) if start else None

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])

    def get(self, name: str) -> str:
        return next((value for found, value in self.headers if found.lower() == name), "")

    def without(self, *names: str) -> Head:
        return Head(self.start, tuple(header for header in self.headers if header[0].lower() not in names))

    def with_length(self, num_bytes: int) -> bytes:
        """Encoded, as the head of a body that is not chunked."""
        plain = self.without("transfer-encoding", "content-length", "trailer")
        return Head(self.start, (*plain.headers, ("Content-Length", str(num_bytes)))).encoded()

    def encoded(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers)]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


@dataclass(frozen=True)
class Side:
    """One of the two connections."""

    socket: socket.socket
    file: BufferedReader

    def body(self, head: Head, *, bodiless: bool = False) -> Body:
        chunked = head.get("transfer-encoding").lower() == "chunked"
        if bodiless or head.start.split(" ")[1] in ("204", "304"):
            return Body(0)
        if chunked:
            data = b"".join(self._chunks())
            return Body(len(data), data=data, was_chunked=True)
        return Body(int(head.get("content-length") or 0), file=self.file)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.file.readline().split(b";")[0] or b"0", 16):
            yield self.file.read(size)
            self.file.readline()
        while self.file.readline().strip():
            pass


@dataclass(frozen=True)
class Body:
    """A body of ``num_bytes``, read from ``file`` as it comes, or held in ``data`` where it was chunked."""

    num_bytes: int
    file: BufferedReader | None = None
    data: bytes = b""
    was_chunked: bool = False

    def __iter__(self) -> Iterator[bytearray]:
        if self.data:
            yield bytearray(self.data)
        left = self.num_bytes if self.file else 0
        while self.file and left:
            block = bytearray(min(left, BLOCK_BYTES))
            got = self.file.readinto1(block)
            if not got:
                raise Cut
            del block[got:]
            left -= got
            yield block


def _refusal(status: int, *, with_body: bool) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{CODES[status]}</Code><Message>injected</Message></Error>".encode()
    head = Head(f"HTTP/1.1 {status} Injected", (("Content-Type", "application/xml"),)).with_length(len(body))
    return head + (body if with_body else b"")


def _hang_up(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
