import hashlib
import logging
import os
import select
import socket
import socketserver
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from orchestrator.errors import TargetError
from orchestrator.targets.kubernetes.forward import PodStream, forwarded

_TIMEOUT_S = 30


class SocketStream:
    """A stream whose pod is a server on the loopback."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=_TIMEOUT_S)
        self.socket.setblocking(True)

    def fileno(self):
        return self.socket.fileno()

    def pending(self):
        return False

    def receive(self):
        return self.socket.recv(32 * 1024) or None

    def send(self, data):
        self.socket.sendall(data)

    def close(self):
        self.socket.close()


class Cluster:
    """Pods by name, each the address of a server."""

    def __init__(self, **pods):
        self.pods = pods
        self.opened = []
        self.streams = []

    def forward(self, pod, port):
        self.opened.append((pod, port))
        if pod not in self.pods:
            raise TargetError(f"Port {port} of pod {pod} cannot be reached.")
        self.streams.append(SocketStream(self.pods[pod]))
        return self.streams[-1]


@contextmanager
def serving(handle):
    """A server whose connections run ``handle(socket)``. Yields its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            handle(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join()


def echo(connection):
    while piece := connection.recv(64 * 1024):
        connection.sendall(piece)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)


def read_to_end(connection):
    return b"".join(iter(lambda: connection.recv(64 * 1024), b""))


def read_exactly(connection, num_bytes):
    digest, left = hashlib.sha256(), num_bytes
    while left:
        piece = connection.recv(min(left, 64 * 1024))
        assert piece, f"{left} of {num_bytes} bytes never came"
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def forwarding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("port-forward")]


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    assert forwarding_threads() == []


def test_fifty_connections_at_once_keep_their_bytes_apart():
    with serving(echo) as address, forwarded(Cluster(head=address), "head", 8265) as port:
        connections = [connect(port) for _ in range(50)]
        for number, connection in enumerate(connections):
            connection.sendall(b"%d " % number * 1000)
        for number, connection in enumerate(connections):
            expected = b"%d " % number * 1000
            assert read_exactly(connection, len(expected)) == hashlib.sha256(expected).hexdigest()
            connection.close()


def test_much_goes_both_ways_at_once_byte_for_byte():
    data = os.urandom(20 * 2**20)
    with serving(echo) as address, forwarded(Cluster(head=address), "head", 8265) as port, connect(port) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        received = read_exactly(connection, len(data))
        sender.join()
    assert received == hashlib.sha256(data).hexdigest()


def test_a_slow_reader_gets_all_of_an_answer_whose_sender_has_ended():
    data = os.urandom(20 * 2**20)

    def answer(connection):
        connection.sendall(data)

    with serving(answer) as address:
        cluster = Cluster(head=address)
        with forwarded(cluster, "head", 8265) as port, connect(port) as connection:
            first = connection.recv(1)
            assert select.select([connection], [], [], _TIMEOUT_S)[0]
            assert first + read_to_end(connection) == data


def test_what_waits_for_a_slow_reader_is_bounded():
    def pour(connection):
        connection.settimeout(1.0)
        sent = 0
        try:
            while sent < 2**30:
                sent += connection.send(bytes(2**20))
        except TimeoutError:
            amounts.append(sent)
        finally:
            stalled.set()

    amounts, stalled = [], threading.Event()
    with serving(pour) as address, forwarded(Cluster(head=address), "head", 8265) as port, connect(port):
        assert stalled.wait(_TIMEOUT_S)
    assert amounts
    assert amounts[0] < 64 * 2**20  # the kernel's own buffers


def test_an_answer_comes_after_the_program_has_said_that_it_sends_no_more():
    def answer(connection):
        question = connection.recv(100)
        half_closed.wait(_TIMEOUT_S)
        connection.sendall(b"answer to " + question)

    half_closed = threading.Event()
    with (
        serving(answer) as address,
        forwarded(Cluster(head=address), "head", 8265) as port,
        connect(port) as connection,
    ):
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        half_closed.set()
        assert read_to_end(connection) == b"answer to question"


def test_an_early_answer_is_read_to_the_end_while_the_program_still_sends():
    refusal = b"401 " + b"x" * 200_000

    def refuse(connection):
        connection.recv(10)
        connection.sendall(refusal)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(64 * 1024):
            pass

    with (
        serving(refuse) as address,
        forwarded(Cluster(head=address), "head", 8265) as port,
        connect(port) as connection,
    ):
        sender = threading.Thread(target=connection.sendall, args=(bytes(5 * 2**20),))
        sender.start()
        assert read_to_end(connection) == refusal
        sender.join()


def test_a_pod_that_cannot_be_reached_gives_a_closed_connection_and_a_line_in_the_log(caplog):
    caplog.set_level(logging.WARNING, logger="headway.kubernetes")
    with serving(echo) as address:
        cluster = Cluster()
        with forwarded(cluster, "head", 8265) as port:
            with connect(port) as connection:
                assert read_to_end(connection) == b""
            cluster.pods["head"] = address
            with connect(port) as connection:  # the next one is none the worse for it
                connection.sendall(b"hello")
                assert connection.recv(5) == b"hello"
    assert "Port 8265 of pod head cannot be reached." in caplog.text


def test_each_connection_goes_to_the_pod_that_is_there_then():
    with serving(lambda c: c.sendall(b"old")) as old, serving(lambda c: c.sendall(b"new")) as new:
        names = iter(["head-1", "head-2"])
        cluster = Cluster(**{"head-1": old, "head-2": new})
        with forwarded(cluster, lambda: next(names), 8265) as port:
            for expected in (b"old", b"new"):
                with connect(port) as connection:
                    assert read_to_end(connection) == expected
    assert cluster.opened == [("head-1", 8265), ("head-2", 8265)]


def test_open_connections_end_with_the_block():
    with serving(echo) as address:
        cluster = Cluster(head=address)
        with forwarded(cluster, "head", 8265) as port:
            connections = [connect(port) for _ in range(5)]
            for connection in connections:
                connection.sendall(b"ping")
                assert connection.recv(4) == b"ping"
        assert forwarding_threads() == []
        assert [connection.recv(1) for connection in connections] == [b""] * 5
        assert [stream.fileno() for stream in cluster.streams] == [-1] * 5
        for connection in connections:
            connection.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(TargetError, match=f"Port {port} .* --port 0"),
            forwarded(Cluster(), "a", 1, local_port=port),
        ):
            pass


class Frames:
    """A WebSocket that has these frames to give."""

    def __init__(self, *frames):
        self.frames = list(frames)
        self.sent = []
        self.sock = SimpleNamespace(pending=lambda: len(self.frames))

    def recv_data_frame(self, control_frame):
        assert control_frame
        opcode, data = self.frames.pop(0)
        return opcode, SimpleNamespace(data=data)

    def send_binary(self, data):
        self.sent.append(data)


BINARY, CLOSE, PING = 0x2, 0x8, 0x9
PORTS = ((BINARY, b"\x00\x49\x20"), (BINARY, b"\x01\x49\x20"))


def test_a_streams_data_comes_without_the_frames_around_it():
    stream = PodStream(Frames(*PORTS, (BINARY, b"\x00hello"), (PING, b"x"), (BINARY, b"\x00\x00\x01"), (CLOSE, b"")))
    assert [stream.receive() for _ in range(6)] == [b"", b"", b"hello", b"", b"\x00\x01", None]


def test_what_is_sent_names_its_channel():
    frames = Frames()
    PodStream(frames).send(b"hello")
    assert frames.sent == [b"\x00hello"]


def test_the_nodes_own_error_is_told():
    stream = PodStream(Frames(*PORTS, (BINARY, b"\x01dial tcp4 127.0.0.1:8265:\n connection refused")))
    stream.receive(), stream.receive()
    with pytest.raises(TargetError, match=r"dial tcp4 127\.0\.0\.1:8265: connection refused"):
        stream.receive()


def test_what_tls_has_read_ahead_is_pending():
    assert PodStream(Frames(PORTS[0])).pending()
    assert not PodStream(Frames()).pending()
