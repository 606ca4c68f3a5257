"""etcd, API server, controller manager and scheduler, on the first node."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from tests.cluster import credentials
from tests.cluster.layout import (
    API_PORT,
    CONTROL_PLANE,
    ETCD_PORT,
    POD_NETWORK,
    SERVICE_NETWORK,
    Layout,
)
from tests.cluster.started import Started

_ETCD_URL = f"http://127.0.0.1:{ETCD_PORT}"
"""Without TLS: it is the loopback of a network namespace of its own, in which nothing else runs as a user."""
_PEER_URL = f"http://127.0.0.1:{ETCD_PORT + 1}"


def start_control_plane(started: Started) -> None:
    """Returns once the API server is ready; the others follow by themselves."""
    layout = started.layout
    namespace = layout.machine(CONTROL_PLANE)
    started.start("etcd", _etcd(layout), namespace=namespace)
    api_server = started.start("kube-apiserver", _api_server(layout), namespace=namespace)
    started.wait("kube-apiserver", api_server, lambda: is_ready(layout))
    for name, command in (
        ("kube-controller-manager", _controller_manager(layout)),
        ("kube-scheduler", _scheduler(layout)),
    ):
        started.start(name, command, namespace=namespace)


def is_ready(layout: Layout) -> bool:
    """Whether the API server says so of itself."""
    try:
        context = ssl.create_default_context(cafile=str(credentials.authority(layout)))
        # A proxy that the environment names is not for this address.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(f"{credentials.API_URL}/readyz", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _etcd(layout: Layout) -> list[str]:
    return [
        "etcd",
        f"--data-dir={layout.run / 'etcd'}",
        f"--listen-client-urls={_ETCD_URL}",
        f"--advertise-client-urls={_ETCD_URL}",
        f"--listen-peer-urls={_PEER_URL}",
        f"--initial-advertise-peer-urls={_PEER_URL}",
        f"--initial-cluster=default={_PEER_URL}",
        "--unsafe-no-fsync",
    ]


def _api_server(layout: Layout) -> list[str]:
    return [
        layout.program("kube-apiserver"),
        f"--etcd-servers={_ETCD_URL}",
        f"--advertise-address={CONTROL_PLANE.address}",
        f"--bind-address={CONTROL_PLANE.address}",
        f"--secure-port={API_PORT}",
        *_pair(layout, "api-server", "tls-cert-file", "tls-private-key-file"),
        f"--client-ca-file={credentials.authority(layout)}",
        f"--token-auth-file={credentials.tokens_file(layout)}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-signing-key-file={credentials.key(layout, 'service-accounts')}",
        f"--service-account-key-file={credentials.key(layout, 'service-accounts')}",
        *_pair(layout, "kubelet-client", "kubelet-client-certificate", "kubelet-client-key"),
        f"--kubelet-certificate-authority={credentials.authority(layout)}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--cert-dir={layout.run / 'api-server'}",
        "--allow-privileged",
    ]


def _controller_manager(layout: Layout) -> list[str]:
    return [
        layout.program("kube-controller-manager"),
        f"--kubeconfig={credentials.kubeconfig(layout, 'controller-manager')}",
        f"--service-account-private-key-file={credentials.key(layout, 'service-accounts')}",
        # Without it no service account gets the authority's certificate, and every client in a pod hangs.
        f"--root-ca-file={credentials.authority(layout)}",
        "--use-service-account-credentials",
        f"--cluster-cidr={POD_NETWORK}",
        "--pvclaimbinder-sync-period=1s",  # by default a claim may wait 15 s for its volume
        f"--flex-volume-plugin-dir={layout.run / 'volume-plugins'}",
        f"--cert-dir={layout.run / 'controller-manager'}",
        "--leader-elect=false",
    ]


def _scheduler(layout: Layout) -> list[str]:
    return [
        layout.program("kube-scheduler"),
        f"--kubeconfig={credentials.kubeconfig(layout, 'scheduler')}",
        f"--cert-dir={layout.run / 'scheduler'}",
        "--leader-elect=false",
    ]


def _pair(layout: Layout, name: str, certificate_flag: str, key_flag: str) -> list[str]:
    certificate: Path = credentials.certificate(layout, name)
    return [f"--{certificate_flag}={certificate}", f"--{key_flag}={credentials.key(layout, name)}"]
