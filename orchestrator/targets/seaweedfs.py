"""The embedded S3 server: SeaweedFS in one process, its data in one directory. The only caller of ``weed``.

Measured with 4.48 on 2 cores: listens 0.8 s after it is started, enforces ``If-None-Match: *``, ends 2.2 s after
SIGTERM. Its data is bound to no port: a directory written with one set of ports is read with another.
Deleted bytes come back when it vacuums, minutes later.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentUnusable, StoreError
from orchestrator.targets import loopback, processes
from orchestrator.targets import ports as machine_ports

DEFAULT_PORT = 8333
GRPC_OFFSET = 10000  # each server also listens on its port plus this
STOP_GRACE_S = 15.0
_START_TIMEOUT_S = 30.0
_VOLUME_MB = 512
"""Objects are packed into files of about this size. Vacuuming one needs as much free space again."""
_CHUNK_MB = 16


@dataclass(frozen=True, kw_only=True)
class Keys:
    access_key: str
    secret_key: str


@dataclass(frozen=True, kw_only=True)
class S3Ports:
    """One port per server inside ``weed mini``; each takes ``GRPC_OFFSET`` above it too."""

    s3: int
    master: int
    volume: int
    filer: int
    admin: int

    def all(self) -> list[int]:
        return [port for each in asdict(self).values() for port in (each, each + GRPC_OFFSET)]


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A started server. ``process`` belongs to the caller, who ends it with :func:`stop_s3` or by its marker."""

    process: subprocess.Popen[bytes]
    ports: S3Ports
    log: Path

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.s3}"


def new_keys() -> Keys:
    return Keys(access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_hex(20))


def choose_ports(*, seed: int, s3: int | None = None, prefer: S3Ports | None = None) -> S3Ports:
    """Free ports for a server: ``s3`` exactly, where it is given, else those of before, else any.

    Raises:
        EnvironmentUnusable: ``s3`` or its gRPC port is taken or leaves no room.
    """
    if s3 is not None:
        if not 1024 <= s3 < 65536 - GRPC_OFFSET:
            raise EnvironmentUnusable(
                f"Port {s3} cannot be the S3 server's: it also uses the port {GRPC_OFFSET} above it.",
                next_step=f"Choose one from 1024 to {65535 - GRPC_OFFSET} with --s3-port.",
            )
        for port in (s3, s3 + GRPC_OFFSET):
            machine_ports.require_free(port, what="the S3 server", flag="--s3-port")
    if prefer is not None and s3 in (None, prefer.s3) and all(map(machine_ports.is_free, prefer.all())):
        return prefer
    chosen = [s3] if s3 is not None else [_choose(DEFAULT_PORT, [], seed)]
    for _ in ("master", "volume", "filer", "admin"):
        chosen.append(_choose(None, chosen, seed))
    return S3Ports(**dict(zip(("s3", "master", "volume", "filer", "admin"), chosen, strict=True)))


def start_s3(
    directory: Path, *, ports: S3Ports, keys: Keys, marker: str, environment: Mapping[str, str], log: Path
) -> S3Server:
    """Start the server on ``directory``, which is made if need be. Returns at once; see :func:`wait_for_s3`.

    Raises:
        EnvironmentUnusable: the ``weed`` program is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "s3.json"
    _write_private(config, _identities(keys))
    process = processes.spawn(
        _command(directory, config, ports),
        # The server would make an administrator of any AWS key that it finds in its environment.
        environment={k: v for k, v in environment.items() if not k.startswith("AWS_")}
        | {processes.MARKER_VARIABLE: marker},
        log=log,
        directory=directory,
    )
    return S3Server(process=process, ports=ports, log=log)


def is_ready(server: S3Server) -> bool:
    """Whether it answers HTTP; a refusal for want of a signature is an answer."""
    answer = loopback.ask(server.ports.s3, "/", timeout_s=2.0)
    return answer is not None and answer.status < 500


def wait_for_s3(server: S3Server, *, timeout_s: float = _START_TIMEOUT_S) -> None:
    """
    Raises:
        EnvironmentUnusable: it ended, or did not answer in time.
    """
    ended = lambda: server.process.poll() is not None  # noqa: E731
    if not processes.wait_until(lambda: is_ready(server), timeout_s=timeout_s, ended=ended):
        raise failure(server, timeout_s=timeout_s)


def failure(server: S3Server, *, timeout_s: float) -> EnvironmentUnusable:
    code = server.process.poll()
    how = f"did not answer within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
    tail = processes.log_tail(server.log)
    return EnvironmentUnusable(f"The S3 server {how}; its last words:\n  {tail}\n", next_step=f"Read {server.log}")


def create_bucket(server: S3Server, bucket: str) -> None:
    """Make a bucket if there is none. A bucket is a folder of SeaweedFS's filer.

    Raises:
        EnvironmentUnusable: the server refused, as it does when its disk is full.
    """
    answer = loopback.ask(server.ports.filer, f"/buckets/{bucket}/", method="POST", timeout_s=10.0)
    if answer is None:
        raise _no_bucket(server, bucket, "it did not answer")
    if not 200 <= answer.status < 300 and answer.status != 409:  # 409: it is there already
        raise _no_bucket(server, bucket, f"it answered {answer.status}: {answer.text[:200]}")


def wait_until_it_stores(server: S3Server, bucket: str, settings: Mapping[str, str]) -> None:
    """Until an object written with the keys in ``settings`` (AWS_… variables) is read back from the bucket: the server
    answers before it knows its keys.

    Raises:
        EnvironmentUnusable: it does not come to that in time.
    """
    from orchestrator.store.s3 import PROMPT, Store, new_client

    store = Store(bucket, "probe", client=new_client(PROMPT, settings))
    key = secrets.token_hex(8)

    def stores() -> bool:
        try:
            store.create(key, b"stored")
            return store.get(key) == b"stored"
        except StoreError:
            return False

    ended = lambda: server.process.poll() is not None  # noqa: E731
    if not processes.wait_until(stores, timeout_s=_START_TIMEOUT_S, ended=ended):
        raise failure(server, timeout_s=_START_TIMEOUT_S)
    store.delete([key])


def _no_bucket(server: S3Server, bucket: str, why: str) -> EnvironmentUnusable:
    return EnvironmentUnusable(
        f"The S3 server did not make the bucket {bucket}: {why}.",
        next_step=f"Is the disk full? Read {server.log}",
    )


def stop_s3(server: S3Server) -> None:
    """End this one server and wait until it is gone."""
    server.process.terminate()
    try:
        server.process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    remove_sockets(server.ports)


def remove_sockets(ports: S3Ports) -> None:
    """Take away the Unix sockets that SeaweedFS leaves under ``/tmp``, named by its ports."""
    for name, port in asdict(ports).items():
        Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)
        Path(f"/tmp/seaweedfs-{name}-grpc-{port + GRPC_OFFSET}.sock").unlink(missing_ok=True)


def _choose(preferred: int | None, taken: list[int], seed: int) -> int:
    def fits(port: int) -> bool:
        return machine_ports.is_free(port) and machine_ports.is_free(port + GRPC_OFFSET)

    return machine_ports.choose([] if preferred is None else [preferred], taken=taken, seed=seed, fits=fits)


def _command(directory: Path, config: Path, ports: S3Ports) -> list[str]:
    return [
        _program(),
        "-logtostderr=true",  # else it leaves log files in /tmp
        "mini",
        f"-dir={directory}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={config}",
        f"-s3.port={ports.s3}",
        f"-master.port={ports.master}",
        f"-volume.port={ports.volume}",
        f"-filer.port={ports.filer}",
        f"-admin.port={ports.admin}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        f"-master.volumeSizeLimitMB={_VOLUME_MB}",
        f"-filer.maxMB={_CHUNK_MB}",
    ]


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise EnvironmentUnusable(
            "The embedded S3 server's program, weed, is not installed.",
            next_step='Install it with: pip install "headway[local]"',
        )
    return found


def _identities(keys: Keys) -> dict[str, Any]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    # Not Admin: a write to a bucket that is not there would make it, and hide a misspelt name.
    actions = ["Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "headway", "credentials": credentials, "actions": actions}]}


def _write_private(path: Path, value: Any) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(json.dumps(value))
