"""The one table of what the test cluster is built from: Go modules at exact versions, and Debian packages."""

from __future__ import annotations

from dataclasses import dataclass

KUBERNETES = "1.34.4"
"""1.34 is the last minor version whose kubelet accepts cgroup v1 with one setting."""
KUBERAY = "1.6.1"
KUEUE = "0.17.0"
COREDNS = "1.14.0"
KUBE_ROUTER = "2.1.0"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program built from a Go module."""

    name: str
    module: str
    version: str
    package: str
    """Path of its main package."""
    in_image: bool
    """Whether it runs in an image without a C library, and so is linked statically."""

    @property
    def stamp(self) -> str:
        """What tells a build of this from a build of something else."""
        return f"{self.module}@v{self.version} {self.package} {'static' if self.in_image else 'dynamic'}"


def _kubernetes(name: str) -> Program:
    module = "k8s.io/kubernetes"
    return Program(name=name, module=module, version=KUBERNETES, package=f"{module}/cmd/{name}", in_image=False)


def _tool(name: str, module: str, version: str, *, package: str = "", in_image: bool) -> Program:
    return Program(name=name, module=module, version=version, package=f"{module}{package}", in_image=in_image)


KUBERNETES_PROGRAMS = tuple(
    _kubernetes(name)
    for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
)
KUBERAY_OPERATOR = _tool("ray-operator", "github.com/ray-project/kuberay/ray-operator", KUBERAY, in_image=True)
KUEUE_MANAGER = _tool("kueue", "sigs.k8s.io/kueue", KUEUE, package="/cmd/kueue", in_image=True)
COREDNS_SERVER = _tool("coredns", "github.com/coredns/coredns", COREDNS, in_image=True)
KUBE_ROUTER_AGENT = _tool(
    "kube-router", "github.com/cloudnativelabs/kube-router/v2", KUBE_ROUTER, package="/cmd/kube-router", in_image=False
)
TOOLS = (KUBERAY_OPERATOR, KUEUE_MANAGER, COREDNS_SERVER, KUBE_ROUTER_AGENT)

DEBIAN_PACKAGES = {
    "conntrack": "conntrack",
    "containerd": "containerd",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "debootstrap": "debootstrap",
    "etcd-server": "etcd",
    "gcc": "cc",
    "iproute2": "ip",
    "ipset": "ipset",
    "iptables": "iptables",
    "openssl": "openssl",
    "runc": "runc",
    "util-linux": "nsenter",
}
"""Package, and a program or file by which to tell that it is installed."""
