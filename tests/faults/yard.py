"""An S3 server that may be killed: started again on its data, with the ports and keys that it had."""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path

from orchestrator.store import Store
from orchestrator.store.s3 import Patience, new_client
from orchestrator.targets import seaweedfs

BUCKET = "headway-faults"
PATIENT = Patience(attempts=8, connect_timeout_s=10.0, read_timeout_s=30.0, first_wait_s=0.1)
"""For the judge, who waits for a server that comes back."""


class Yard:
    """The server, and stores in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._keys = seaweedfs.new_keys()
        self._ports = seaweedfs.choose_ports(seed=secrets.randbits(32))
        self._restart: threading.Thread | None = None
        self._server = self._start()
        seaweedfs.create_bucket(self._server, BUCKET)
        seaweedfs.wait_until_it_stores(self._server, BUCKET, self.settings)
        self._root = Store(BUCKET, client=new_client(PATIENT, self.settings))

    @property
    def endpoint_url(self) -> str:
        return self._server.endpoint_url

    @property
    def settings(self) -> dict[str, str]:
        """AWS_… variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._keys.access_key,
            "AWS_SECRET_ACCESS_KEY": self._keys.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def new_store(self) -> Store:
        """A place of its own, past any proxy."""
        return self._root.at(BUCKET, secrets.token_hex(6))

    def bounce_server(self, down_s: float) -> None:
        """Kill it now; start it again behind the caller's back after ``down_s``."""
        self._server.process.kill()
        self._server.process.wait()
        self._restart = threading.Timer(down_s, self._start_again)
        self._restart.start()

    def await_server(self) -> None:
        """Wait until it has been started again, if it was killed."""
        if self._restart is not None:
            self._restart.join()
            self._restart = None
            seaweedfs.wait_until_it_stores(self._server, BUCKET, self.settings)

    def close(self) -> None:
        self.await_server()
        seaweedfs.stop_s3(self._server)

    def _start_again(self) -> None:
        self._server = self._start()

    def _start(self) -> seaweedfs.S3Server:
        server = seaweedfs.start_s3(
            self._directory / "data",
            ports=self._ports,
            keys=self._keys,
            marker="headway-faults",
            environment=os.environ,
            log=self._directory / "s3.log",
        )
        seaweedfs.wait_for_s3(server)
        return server
