"""The embedded Ray head. Ray is started and asked through its command line and HTTP; it is never imported here.

Measured on 2 cores: the dashboard answers 3 s after the start, the job agent after 4 s. Serve's first application
answers 6 s after it is asked for.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import loopback, processes, ray_token

# Ray replaces 127.0.0.1 by the address of the machine's network, which changes when a laptop moves and then
# breaks the cluster. Another loopback address stays, and keeps Ray's HTTP agents off the network.
NODE_ADDRESS = "127.0.0.2"
DEFAULT_GCS_PORT = 6379
DEFAULT_DASHBOARD_PORT = 8265
DEFAULT_SERVE_PORT = 8000
_OBJECT_STORE_BYTES = 512 * 2**20
JOB_STOP_GRACE_S = 60
"""From SIGTERM to SIGKILL for a job that is stopped: long enough to save a checkpoint. Ray's own default is 3 s."""


@dataclass(frozen=True, kw_only=True)
class RayPorts:
    """Ports that would collide with another Ray on this machine. Ray chooses the others itself, at random."""

    gcs: int
    dashboard: int
    serve: int
    client: int
    agent: int


def head_command(*, ports: RayPorts, temp_directory: Path, num_cpus: int) -> list[str]:
    """
    Raises:
        EnvironmentUnusable: Ray is not installed.
    """
    return [
        _program(),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={NODE_ADDRESS}",
        f"--port={ports.gcs}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--ray-client-server-port={ports.client}",
        # 0: any free port. The default is a fixed range, in which a port may be another's.
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_directory}",
        "--disable-usage-stats",
    ]


def head_environment(
    base: Mapping[str, str], *, marker: str, store: Mapping[str, str], temp_directory: Path
) -> dict[str, str]:
    """The head's environment, which every job and worker inherits. ``store`` is what reaches the stack's S3."""
    # An address would make the head look for a cluster to join; without bytecode every worker recompiles torch.
    dropped = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONDONTWRITEBYTECODE"}
    kept = {k: v for k, v in base.items() if k not in dropped and not k.startswith("AWS_")}
    scripts = str(Path(sys.executable).parent)
    return {
        **kept,
        **store,
        processes.MARKER_VARIABLE: marker,
        # Ray writes its titles over a process's environment, and with it over the marker, unless told not to.
        "SPT_NOENV": "1",
        "TMPDIR": str(temp_directory),  # what killed processes leave behind goes with it
        "PATH": f"{scripts}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "NO_PROXY": ",".join(filter(None, [kept.get("NO_PROXY"), "127.0.0.1", NODE_ADDRESS, "localhost"])),
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_GRACE_S),
        # The head would wait half a minute for its own workers to leave before it ends.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Unset, Ray would ask for a token wherever a file from some earlier cluster lies in the home directory, and
        # its own `ray job submit` shows one only where this is set. Whoever wants tokens sets it to token.
        ray_token.MODE_VARIABLE: kept.get(ray_token.MODE_VARIABLE, "disabled"),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        **({} if has_nvidia_gpu() else {"DS_ACCELERATOR": "cpu"}),
    }


def default_num_cpus() -> int:
    """Logical CPUs given to Ray: at least two workers fit, and one slot beside them for the model that serves."""
    return max(len(os.sched_getaffinity(0)), 2) + 1


def has_nvidia_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def is_ready(ports: RayPorts) -> bool:
    """Whether jobs can be submitted: the dashboard answers, and so does the agent that starts jobs."""
    headers = ray_token.headers(ray_token.token_for("127.0.0.1", os.environ))
    for port, path in ((ports.dashboard, "/api/jobs/"), (ports.agent, "/api/local_raylet_healthz")):
        answer = loopback.ask(port, path, headers=headers)
        if answer is None or answer.status != 200:
            return False
    return True


def start_head(
    *, ports: RayPorts, temp_directory: Path, num_cpus: int, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start the head. Returns at once; it is up when :func:`is_ready`."""
    command = head_command(ports=ports, temp_directory=temp_directory, num_cpus=num_cpus)
    return processes.spawn(command, environment=environment, log=log, directory=temp_directory)


def _program() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise EnvironmentUnusable("Ray is not installed.", next_step='Install it with: pip install "headway[local]"')
    return found
