"""A pod's port on this machine's loopback, through the Kubernetes API.

Each connection has a WebSocket of its own (``v4.channel.k8s.io``, kubelet's ``cri/streaming/portforward/websocket.go``)
and one thread, which holds at most one piece of data each way: whoever is slow slows the other side down, as with
plain TCP. ``kubernetes.stream.portforward`` is not used for that. It swaps a method of the shared ``ApiClient`` while
it connects, so that two threads, or one and any other request, get into each other's way; and its connections end as
a whole where the local program only says that it sends no more, so that the answer is lost.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Protocol

from orchestrator.errors import TargetError

_PIECE_BYTES = 16 * 1024
"""Small enough that a WebSocket which is ready to be written to takes it whole."""
_LINGER_S = 60.0
"""How long a connection that one side has ended may be silent."""
_JOIN_S = 5.0
_DATA, _ERROR = 0, 1  # the channels of the first and only port
_BINARY, _CLOSE = 0x2, 0x8  # RFC 6455, 5.2
_GONE = select.POLLERR | select.POLLHUP

logger = logging.getLogger("headway.kubernetes")


class Stream(Protocol):
    """A connection to a pod's port."""

    def fileno(self) -> int: ...

    def pending(self) -> bool:
        """Whether there is something to receive that waiting for the file descriptor does not tell."""
        ...

    def receive(self) -> bytes | None:
        """What came, which may be nothing; None once the pod's side has ended.

        Raises:
            TargetError: the pod's node could not connect to the port.
        """
        ...

    def send(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class Forwarding(Protocol):
    """What opens streams: :class:`orchestrator.targets.kubernetes.client.KubernetesClient`."""

    def forward(self, pod: str, port: int) -> Stream:
        """
        Raises:
            TargetError: the API or the pod cannot be reached.
        """
        ...


class PodStream:
    """A :class:`Stream` over the WebSocket that the API opened for one port (a ``websocket.WebSocket``)."""

    def __init__(self, websocket: Any) -> None:
        self._websocket = websocket
        self._announced: set[int] = set()

    def fileno(self) -> int:
        return int(self._websocket.fileno())

    def pending(self) -> bool:
        tls_pending = getattr(self._websocket.sock, "pending", None)
        return tls_pending is not None and tls_pending() > 0

    def receive(self) -> bytes | None:
        opcode, frame = self._websocket.recv_data_frame(True)
        if opcode == _CLOSE:
            return None
        if opcode != _BINARY or not frame.data:  # a ping, which is answered already
            return b""
        channel, data = frame.data[0], frame.data[1:]
        if channel not in self._announced:  # each channel begins with the port's number
            self._announced.add(channel)
            return b""
        if channel == _ERROR:
            raise TargetError(" ".join(data.decode(errors="replace").split()))
        return bytes(data)

    def send(self, data: bytes) -> None:
        self._websocket.send_binary(bytes([_DATA]) + data)

    def close(self) -> None:
        self._websocket.shutdown()


@contextmanager
def forwarded(client: Forwarding, pod: str | Callable[[], str], port: int, *, local_port: int = 0) -> Iterator[int]:
    """Listen on 127.0.0.1 while the block runs, and carry every connection to a pod's port.

    What goes wrong with one connection ends that one and is logged. A pod that is gone shows as closed connections.

    Args:
        pod: its name, or what names it for each new connection, so that a replaced pod is found again.
        local_port: 0 takes a free one.

    Yields:
        The local port.

    Raises:
        TargetError: the local port is taken.
    """

    def open_stream() -> Stream:
        return client.forward(pod if isinstance(pod, str) else pod(), port)

    listener = _listen(local_port)
    address = listener.getsockname()
    forwarder = _Forwarder(listener, open_stream)
    try:
        yield int(address[1])
    finally:
        forwarder.close()


class _Forwarder:
    """Accepts connections until it is closed."""

    def __init__(self, listener: socket.socket, open_stream: Callable[[], Stream]) -> None:
        self._listener, self._open_stream = listener, open_stream
        self._connections: list[_Connection] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="port-forward", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        with suppress(OSError):  # wakes the thread on every system, which closing the socket does not
            socket.create_connection(self._listener.getsockname(), timeout=_JOIN_S).close()
        self._thread.join(_JOIN_S)
        self._listener.close()
        for connection in self._connections:
            connection.end()
        deadline = time.monotonic() + _JOIN_S
        for connection in self._connections:
            connection.thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError as e:  # one that ended again already, or no file descriptor left
                logger.warning("A connection could not be accepted: %s", e)
                self._closing.wait(0.1)
                continue
            if self._closing.is_set():
                client.close()
                return
            self._connections = [each for each in self._connections if each.thread.is_alive()]
            self._connections.append(_Connection(client, self._open_stream))


class _Connection:
    """One local connection and its thread."""

    def __init__(self, client: socket.socket, open_stream: Callable[[], Stream]) -> None:
        self._client, self._open_stream = client, open_stream
        # Daemon: an API server that never answers must not keep the program from ending.
        self.thread = threading.Thread(target=self._run, name="port-forward-connection", daemon=True)
        self.thread.start()

    def end(self) -> None:
        with suppress(OSError):  # its thread may have closed it
            self._client.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            with self._client, closing(self._open_stream()) as stream:
                _carry(self._client, stream)
        except (ConnectionResetError, BrokenPipeError):  # the local program went away
            pass
        except Exception as e:  # whatever it is, the other connections go on
            logger.warning("A forwarded connection ended: %s", e)


def _carry(client: socket.socket, stream: Stream) -> None:
    """Carry bytes both ways until both sides have ended.

    The protocol has no word for "I send no more": where the local program says so, the pod does not learn of it, but
    its answer still comes. Where the pod's side ends first, what the program still sends is thrown away, so that it
    reads the answer to the end instead of a reset.
    """
    client.setblocking(False)
    to_pod = to_client = b""
    client_open = pod_open = True
    while client_open or pod_open:
        poll = select.poll()
        reading = select.POLLIN if client_open and not to_pod else 0
        poll.register(client, reading | (select.POLLOUT if to_client else 0))
        receiving = pod_open and not to_client
        if receiving or (pod_open and to_pod):
            poll.register(stream, (select.POLLIN if receiving else 0) | (select.POLLOUT if to_pod else 0))
        pending = receiving and stream.pending()
        wait_s = 0 if pending else None if client_open and pod_open else _LINGER_S
        ready = dict(poll.poll(None if wait_s is None else wait_s * 1000))
        if not ready and not pending:
            return
        at_client, at_pod = ready.get(client.fileno(), 0), ready.get(stream.fileno(), 0) if pod_open else 0
        if at_client & _GONE:
            return
        if at_client & select.POLLOUT:
            to_client = to_client[client.send(to_client) :]
        if at_client & select.POLLIN:
            data = client.recv(_PIECE_BYTES)
            client_open, to_pod = bool(data), data if pod_open else b""
        elif to_pod and at_pod & select.POLLOUT:
            stream.send(to_pod)
            to_pod = b""
        if receiving and (pending or at_pod & (select.POLLIN | _GONE)):
            received = stream.receive()
            if received is None:
                pod_open, to_pod = False, b""
                client.shutdown(socket.SHUT_WR)
            else:
                to_client = received


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=128)
    except OSError as e:
        raise TargetError(
            f"Port {port} of this machine cannot be listened on: {e.strerror or e}.",
            next_step="Choose another one, or 0 for any: --port 0",
        ) from e
