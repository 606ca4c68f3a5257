"""Ends everything that a start made, also one that was interrupted, killed or crashed. Needs no record of it.

Processes are known by their mark, those in containers by their root, mounts by their place under the cluster's
directory, and the network by its names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from tests.cluster import network
from tests.cluster.containers import end_containers, in_containers
from tests.cluster.layout import NODES, Layout
from tests.cluster.mounts import unmount_under
from tests.cluster.nodes import remove_containers

_GRACE_S = 5.0
_SHIM_SOCKETS = Path("/run/containerd/s")
_DEVICE_SOCKETS = Path("/var/lib/kubelet/device-plugins")
_CONTAINER_LOGS = Path("/var/log/containers")
_FIXED_FOLDERS = (
    _CONTAINER_LOGS,
    *(network.CNI_RESULTS, network.CNI_RESULTS.parent),
    *(_SHIM_SOCKETS, _SHIM_SOCKETS.parent),
    *(_DEVICE_SOCKETS, _DEVICE_SOCKETS.parent),
)
"""Where containerd and the kubelet put files whatever they are told. Each is taken away once it is empty."""


def end_everything(layout: Layout) -> int:
    """Returns how many processes were ended.

    Raises:
        EnvironmentUnusable: something does not end; what could be ended has ended.
    """
    marked = processes.marked(layout.id)
    # All but containerd first: the kubelets would start again what is ended below.
    _kill(each for each in marked if not _is_containerd(each))
    num_in_containers = end_containers(layout.directory)
    for node in NODES:
        if _is_served(layout.socket(node)):
            # A shim whose containers are forgotten goes by itself; its mark ends it where that fails.
            with contextlib.suppress(EnvironmentUnusable):
                remove_containers(layout, node)
    processes.end(layout.id, grace_s=_GRACE_S)
    unmount_under(layout.directory)
    network.remove_network(layout)
    network.remove_cni_state(layout)
    _remove_files_elsewhere(layout)
    shutil.rmtree(layout.run, ignore_errors=True)
    layout.description.unlink(missing_ok=True)
    return len(marked) + num_in_containers


def left_behind(layout: Layout) -> bool:
    """Whether anything of a start is there."""
    running = processes.marked(layout.id) or in_containers(layout.directory)
    return bool(running or network.existing_namespaces(layout) or layout.run.exists())


def _is_containerd(process: Identity) -> bool:
    return Path(processes.command_line(process.pid).split(" ")[0]).name.startswith("containerd")


def _kill(found: Iterable[Identity]) -> None:
    for process in found:
        if processes.alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _remove_files_elsewhere(layout: Layout) -> None:
    for path in (*_SHIM_SOCKETS.glob("*"), *_DEVICE_SOCKETS.glob("*.sock")):
        if path.is_socket() and not _is_served(path):
            path.unlink(missing_ok=True)
    for link in _CONTAINER_LOGS.glob("*.log"):
        if link.is_symlink() and Path(os.readlink(link)).is_relative_to(layout.logs):
            link.unlink()
    for folder in _FIXED_FOLDERS:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
