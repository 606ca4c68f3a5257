"""The nodes: a containerd and a kubelet each, and what makes services and network policies work there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster import credentials, network
from tests.cluster.images import PAUSE_IMAGE, Image, all_images, archive
from tests.cluster.layout import (
    CLUSTER_DOMAIN,
    DNS_SERVICE_ADDRESS,
    POD_NETWORK,
    SERVICE_NETWORK,
    Layout,
    Node,
)
from tests.cluster.shell import run, succeeds
from tests.cluster.started import Started

_CNI_PROGRAMS = "/usr/lib/cni"
GPU = "nvidia.com/gpu"


def start_containerd(started: Started, node: Node) -> None:
    """Start it with every image imported and no container left from before."""
    _write_containerd_config(started.layout, node)
    if not _serve_containerd(started, node):
        # It knew containers of a start that did not end well. They are gone, and so must be what it remembers.
        _serve_containerd(started, node)
    for image in all_images(started.layout):
        _import(started.layout, node, image)


def start_kubelet(started: Started, node: Node) -> None:
    """Start it; the node is ready once the API server says so."""
    layout = started.layout
    config = layout.run / f"{node.name}-kubelet.json"
    config.write_text(json.dumps(_kubelet_config(layout, node), indent=2))
    command = [
        layout.program("kubelet"),
        f"--config={config}",
        f"--kubeconfig={credentials.kubeconfig(layout, node.name)}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--root-dir={kubelet_directory(layout, node)}",
        f"--cert-dir={layout.run / f'{node.name}-pki'}",
    ]
    started.start(f"kubelet-{node.name}", command, namespace=layout.machine(node))


def start_network_agents(started: Started, node: Node) -> None:
    """kube-proxy makes services work, kube-router's firewall network policies. Both need the node to be registered."""
    layout = started.layout
    proxy = [
        layout.program("kube-proxy"),
        f"--kubeconfig={credentials.kubeconfig(layout, 'kube-proxy')}",
        f"--hostname-override={node.name}",
        "--proxy-mode=iptables",
        f"--cluster-cidr={POD_NETWORK}",
        # These would be kernel settings of the whole machine.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s",
    ]
    router = [
        layout.program("kube-router"),
        f"--kubeconfig={credentials.kubeconfig(layout, 'kube-router')}",
        f"--hostname-override={node.name}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--run-firewall=true",
        "--run-router=false",
        "--run-service-proxy=false",
        "--run-loadbalancer=false",
    ]
    started.start(f"kube-proxy-{node.name}", proxy, namespace=layout.machine(node))
    started.start(f"kube-router-{node.name}", router, namespace=layout.machine(node))


def gpu_patch(num_gpus: int) -> str:
    """What gives a node GPUs that are only numbers; the scheduler counts them like real ones."""
    counted = {GPU: str(num_gpus)}
    return json.dumps({"status": {"capacity": counted, "allocatable": counted}})


def remove_containers(layout: Layout, node: Node) -> None:
    """Make containerd forget all its containers, whose processes have ended."""
    if containers := _containers(layout, node):
        run([*ctr(layout, node), "containers", "rm", *containers])


def ctr(layout: Layout, node: Node) -> list[str]:
    """The command that speaks to a node's containerd, about what Kubernetes made there."""
    return ["ctr", "--address", str(layout.socket(node)), "--namespace", "k8s.io"]


def kubelet_directory(layout: Layout, node: Node) -> Path:
    return layout.run / f"{node.name}-kubelet"


def pod_logs(layout: Layout, node: Node) -> Path:
    return layout.logs / f"{node.name}-pods"


def _serve_containerd(started: Started, node: Node) -> bool:
    """Start containerd; False where it had containers, which are removed, and it is stopped again."""
    layout = started.layout
    name = f"containerd-{node.name}"
    command = ["containerd", "--config", str(_containerd_config(layout, node))]
    process = started.start(name, command, namespace=layout.machine(node))
    started.wait(name, process, lambda: succeeds([*ctr(layout, node), "version"]))
    if not _containers(layout, node):
        return True
    remove_containers(layout, node)
    process.terminate()
    process.wait()
    return False


def _containers(layout: Layout, node: Node) -> list[str]:
    return run([*ctr(layout, node), "containers", "ls", "--quiet"]).split()


def _import(layout: Layout, node: Node, image: Image) -> None:
    stamp = layout.node(node) / f"{image.file}.imported"
    if stamp.exists() and stamp.read_text() == image.digest:
        return
    run([*ctr(layout, node), "image", "import", str(archive(layout, image))])
    stamp.write_text(image.digest)


def _containerd_config(layout: Layout, node: Node) -> Path:
    return layout.run / f"{node.name}-containerd.toml"


def _write_containerd_config(layout: Layout, node: Node) -> None:
    layout.node(node).mkdir(parents=True, exist_ok=True)
    cni = layout.run / f"{node.name}-cni"
    cni.mkdir(exist_ok=True)
    config = network.cni_config(layout.machine(node), node.pod_subnet, layout.run / f"{node.name}-addresses")
    (cni / "10-pods.conflist").write_text(json.dumps(config, indent=2))
    _containerd_config(layout, node).write_text(
        f"""version = 2
root = "{layout.node(node) / "containerd"}"
state = "{layout.run / f"{node.name}-state"}"
[grpc]
  address = "{layout.socket(node)}"
[plugins."io.containerd.grpc.v1.cri"]
  # Lowering a process's OOM score needs CAP_SYS_RESOURCE, which root in a container may lack.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  sandbox_image = "{PAUSE_IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI_PROGRAMS}"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    Root = "{layout.run / f"{node.name}-runc"}"
"""
    )


def _kubelet_config(layout: Layout, node: Node) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(credentials.authority(layout))},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(credentials.certificate(layout, f"kubelet-{node.name}")),
        "tlsPrivateKeyFile": str(credentials.key(layout, f"kubelet-{node.name}")),
        "containerRuntimeEndpoint": f"unix://{layout.socket(node)}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.machine(node)}",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [DNS_SERVICE_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": "",
        "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "200Mi"},
        # Images are imported, not pulled: one that the kubelet collects does not come back.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "makeIPTablesUtilChains": False,
        "podLogsDir": str(pod_logs(layout, node)),
        "volumePluginDir": str(kubelet_directory(layout, node) / "volume-plugins"),
    }
