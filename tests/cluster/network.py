"""The cluster's network: a namespace per node, one for the wire between them, and this machine's end of it.

All of it is in namespaces of its own, but for one interface and its routes. So nothing of this machine's firewall,
routing or kernel settings is changed, and deleting the namespaces deletes every rule, set and bridge in them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentUnusable
from tests.cluster.layout import (
    CONTROL_PLANE,
    HOST_ADDRESS,
    LAN_NETWORK,
    NODES,
    POD_NETWORK,
    S3_ADDRESS,
    S3_PORT,
    SERVICE_NETWORK,
    Layout,
    Node,
)
from tests.cluster.shell import run, succeeds

_PREFIX = ipaddress.ip_network(LAN_NETWORK).prefixlen
CNI_RESULTS = Path("/var/lib/cni/results")
_BRIDGE = "lan"
_BRIDGE_SETTINGS = Path("/proc/sys/net/bridge")
_NAMESPACES = Path("/run/netns")


def inside(namespace: str, command: list[str]) -> list[str]:
    """The command, run in a network namespace.

    Not ``ip netns exec``: it mounts a new ``/sys``, without the control groups.
    """
    return ["nsenter", f"--net={_NAMESPACES / namespace}", *command]


def make_network(layout: Layout) -> None:
    """
    Raises:
        EnvironmentUnusable: an address range is in use on this machine.
    """
    _require_free_ranges()
    if not _BRIDGE_SETTINGS.exists():
        run(["modprobe", "br_netfilter"])
    _make_lan(layout)
    _plug(layout.lan, None, layout.host_interface, HOST_ADDRESS, port="host")
    for node in NODES:
        _make_node(layout, node)
    for node in NODES:
        others = [layout.machine(each) for each in NODES if each != node]
        for somewhere in (None, layout.lan, *others):
            _ip(somewhere, f"route add {node.pod_subnet} via {node.address}")
    _ip(None, f"route add {SERVICE_NETWORK} via {CONTROL_PLANE.address}")


def remove_network(layout: Layout) -> None:
    """Take it all away, as far as it is there."""
    for namespace in existing_namespaces(layout):
        run(["ip", "netns", "delete", namespace])
    _remove_mount_point()
    # Its other end went with its namespace, but the kernel may take a moment for that.
    with contextlib.suppress(EnvironmentUnusable):
        run(["ip", "link", "delete", layout.host_interface])


def existing_namespaces(layout: Layout) -> list[str]:
    """Those of this cluster that are there."""
    ours = [layout.lan, *map(layout.machine, NODES)]
    return [name for name in ours if (_NAMESPACES / name).exists()]


def cni_config(name: str, subnet: str, state: Path) -> dict[str, Any]:
    """What containerd gives to the CNI plugins: pods on a bridge of the node, addresses from its range."""
    bridge = {
        "type": "bridge",
        "bridge": "pods",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(state),
        },
    }
    return {"cniVersion": "0.4.0", "name": name, "plugins": [bridge]}


def remove_cni_state(layout: Layout) -> None:
    """The results that the CNI library caches, two for each pod, named by network, pod and interface."""
    for network in map(layout.machine, NODES):
        for result in CNI_RESULTS.glob(f"{network}-*"):
            pod = result.name.removeprefix(f"{network}-").rsplit("-", 1)[0]
            (CNI_RESULTS / f"cni-loopback-{pod}-lo").unlink(missing_ok=True)
            result.unlink(missing_ok=True)


def _remove_mount_point() -> None:
    """Where ``ip`` keeps namespaces is a mount of its own, made with the first and not taken away with the last."""
    with contextlib.suppress(OSError):
        if not any(_NAMESPACES.iterdir()) and succeeds(["umount", str(_NAMESPACES)]):
            _NAMESPACES.rmdir()


def _require_free_ranges() -> None:
    ranges = [ipaddress.ip_network(each) for each in (LAN_NETWORK, POD_NETWORK, SERVICE_NETWORK)]
    for route in json.loads(run(["ip", "-json", "-4", "route", "show", "table", "main"])):
        if route["dst"] == "default":
            continue
        taken = ipaddress.ip_network(route["dst"])
        for each in ranges:
            if taken.overlaps(each):
                raise EnvironmentUnusable(
                    f"This machine already routes {taken} (to {route.get('dev', 'nowhere')}), and the test cluster "
                    f"uses {each}.",
                    next_step="End the test cluster of another directory, if it is one; else use another machine",
                )


def _make_lan(layout: Layout) -> None:
    _make_namespace(layout.lan)
    _ip(layout.lan, f"link add {_BRIDGE} type bridge")
    _ip(layout.lan, f"addr add {S3_ADDRESS}/{_PREFIX} dev {_BRIDGE}")
    _ip(layout.lan, f"link set {_BRIDGE} up")
    # The S3 server's other ports ask for no key, so only its own may be reached from outside its namespace.
    refused = ["-A", "INPUT", "-i", _BRIDGE, "-p", "tcp", "--syn", "!", "--dport", str(S3_PORT), "-j", "REJECT"]
    run(inside(layout.lan, ["iptables", *refused]))


def _make_node(layout: Layout, node: Node) -> None:
    namespace = layout.machine(node)
    _make_namespace(namespace)
    _plug(layout.lan, namespace, "eth0", node.address, port=node.name)
    # A service's address is rewritten to a pod's, but a connection that has no route to it is not even tried.
    # There is no default route: what a pod asks of the world outside is refused at once.
    _ip(namespace, f"route add {SERVICE_NETWORK} dev eth0")
    # Pods of one node talk over its bridge; br_netfilter lets the firewall see that too.
    settings = ["net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1"]
    run(inside(namespace, ["sysctl", "--quiet", "--write", *settings]))


def _make_namespace(name: str) -> None:
    run(["ip", "netns", "add", name])
    _ip(name, "link set lo up")


def _plug(lan: str, namespace: str | None, interface: str, address: str, *, port: str) -> None:
    """Give a namespace (None: this machine's own) an interface on the wire."""
    peer = f"{port}-end"
    _ip(lan, f"link add {port} type veth peer name {peer}")
    _ip(lan, f"link set {port} master {_BRIDGE} up")
    owner = namespace or str(os.getpid())  # a namespace may be named by a process in it
    _ip(lan, f"link set {peer} netns {owner}")
    _ip(namespace, f"link set {peer} name {interface}")
    _ip(namespace, f"addr add {address}/{_PREFIX} dev {interface}")
    _ip(namespace, f"link set {interface} up")


def _ip(namespace: str | None, words: str) -> None:
    command = ["ip", *words.split()]
    run(command if namespace is None else inside(namespace, command))
