"""The embedded stack's description: where it is, how to reach it, which processes it is. No process is touched here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from orchestrator.targets.ray_head import NODE_ADDRESS, RayPorts
from orchestrator.targets.seaweedfs import Keys, S3Ports

FOLDER = ".headway"
REGION = "us-east-1"
BUCKET = "headway"
STORE = f"s3://{BUCKET}/main"
_FILE = "stack.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One embedded stack. Its file is readable by its owner only, since it holds the S3 keys."""

    id: str
    directory: Path
    """The ``.headway`` folder."""
    keys: Keys
    s3_ports: S3Ports
    ray_ports: RayPorts
    s3_process: Identity | None = None
    ray_process: Identity | None = None

    @property
    def store(self) -> str:
        return STORE

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.s3_ports.s3}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.ray_ports.dashboard}"

    @property
    def serve_url(self) -> str:
        return f"http://127.0.0.1:{self.ray_ports.serve}"

    @property
    def ray_address(self) -> str:
        """For ``ray.init(address=…)``."""
        return f"{NODE_ADDRESS}:{self.ray_ports.gcs}"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def data(self) -> Path:
        return self.directory / "s3"

    @property
    def temp_directory(self) -> Path:
        """Ray's session. Under ``/tmp`` because a Unix socket's path ends at 107 bytes (unix(7))."""
        return Path(f"/tmp/headway-{self.id}")

    def store_environment(self) -> dict[str, str]:
        """What reaches the stack's store, in boto3's own words."""
        return {
            "AWS_ACCESS_KEY_ID": self.keys.access_key,
            "AWS_SECRET_ACCESS_KEY": self.keys.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "HEADWAY_STORE": self.store,
        }

    def environment(self) -> dict[str, str]:
        """What a client needs: the store, and Ray (``ray.init()``, ``ray job submit``)."""
        return {
            **self.store_environment(),
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
        }

    def apply_to(self, environ: MutableMapping[str, str]) -> None:
        """Point a process at this stack. Takes other AWS settings away: a session token or a profile would win."""
        for name in [name for name in environ if name.startswith("AWS_")]:
            del environ[name]
        environ.update(self.environment())
        around = [environ.get("NO_PROXY", ""), "127.0.0.1", NODE_ADDRESS, "localhost"]
        environ["NO_PROXY"] = ",".join(part for part in around if part)


def stack_id(directory: Path) -> str:
    """One id per folder and user, so that what an earlier stack here left behind is recognised without its file."""
    return hashlib.sha256(f"{os.getuid()}:{directory.resolve()}".encode()).hexdigest()[:12]


def running(stack: Stack) -> bool:
    """Whether both of its processes are those that were started."""
    return all(each is not None and processes.alive(each) for each in (stack.s3_process, stack.ray_process))


def find(start: Path) -> Stack | None:
    """The stack of ``start`` or of the nearest folder above it, running or not."""
    resolved = start.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / FOLDER / _FILE).is_file():
            return load(folder / FOLDER)
    return None


def load(directory: Path) -> Stack | None:
    """The stack described in a ``.headway`` folder, or None where there is none.

    Raises:
        EnvironmentUnusable: its file cannot be read.
    """
    path = directory / _FILE
    try:
        return _from_json(directory.resolve(), json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EnvironmentUnusable(
            f"{path} cannot be read ({type(e).__name__}: {e}).",
            next_step="Take that file away and start anew: headway up. It holds the keys of the data beside it, "
            "which a new start replaces.",
        ) from e


def save(stack: Stack) -> None:
    """Write the stack's file, whole or not at all."""
    path = stack.directory / _FILE
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(_to_json(stack), indent=2) + "\n")
    partial.replace(path)


def _to_json(stack: Stack) -> dict[str, Any]:
    named = {"s3": stack.s3_process, "ray": stack.ray_process}
    return {
        "format": _FORMAT,
        "id": stack.id,
        "keys": asdict(stack.keys),
        "ports": {"s3": asdict(stack.s3_ports), "ray": asdict(stack.ray_ports)},
        "processes": {name: each.to_json() for name, each in named.items() if each is not None},
    }


def _from_json(directory: Path, value: dict[str, Any]) -> Stack:
    if value["format"] != _FORMAT:
        raise ValueError(f"format {value['format']!r} is not {_FORMAT}")
    found = {name: Identity.from_json(each) for name, each in value["processes"].items()}
    return Stack(
        id=str(value["id"]),
        directory=directory,
        keys=Keys(**value["keys"]),
        s3_ports=S3Ports(**value["ports"]["s3"]),
        ray_ports=RayPorts(**value["ports"]["ray"]),
        s3_process=found.get("s3"),
        ray_process=found.get("ray"),
    )
