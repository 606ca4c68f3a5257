"""Who is who in the cluster: one certificate authority, tokens, and a kubeconfig for each."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.layout import (
    API_PORT,
    API_SERVICE_ADDRESS,
    CLUSTER_DOMAIN,
    CONTROL_PLANE,
    NODES,
    Layout,
)
from tests.cluster.shell import run

API_URL = f"https://{CONTROL_PLANE.address}:{API_PORT}"
KUEUE_WEBHOOK = "kueue-webhook-service.kueue-system.svc"
_NUM_DAYS = 365


@dataclass(frozen=True, kw_only=True)
class User:
    """Someone whom the API server knows by a token."""

    file: str
    name: str
    groups: Sequence[str]


USERS = (
    User(file="admin", name="admin", groups=["system:masters"]),
    User(file="controller-manager", name="system:kube-controller-manager", groups=[]),
    User(file="scheduler", name="system:kube-scheduler", groups=[]),
    User(file="kube-proxy", name="system:kube-proxy", groups=[]),
    User(file="kube-router", name="kube-router", groups=["system:masters"]),
    *(User(file=each.name, name=f"system:node:{each.name}", groups=["system:nodes"]) for each in NODES),
)


def write_credentials(layout: Layout) -> None:
    """Make all keys, certificates and kubeconfigs anew. Only their owner can read them."""
    layout.run.mkdir(parents=True, exist_ok=True)
    layout.run.chmod(0o700)
    _authority(layout)
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{CLUSTER_DOMAIN}"]
    addresses = [CONTROL_PLANE.address, API_SERVICE_ADDRESS, "127.0.0.1"]
    _certificate(layout, "api-server", subject="/CN=kube-apiserver", names=["localhost", *names], addresses=addresses)
    _certificate(layout, "kubelet-client", subject="/O=system:masters/CN=kube-apiserver-kubelet-client")
    _certificate(
        layout, "kueue-webhook", subject="/CN=kueue", names=[KUEUE_WEBHOOK, f"{KUEUE_WEBHOOK}.{CLUSTER_DOMAIN}"]
    )
    for node in NODES:
        _certificate(layout, f"kubelet-{node.name}", subject=f"/CN={node.name}", addresses=[node.address])
    run(["openssl", "genrsa", "-out", str(key(layout, "service-accounts")), "2048"])
    tokens = {user.file: secrets.token_hex(32) for user in USERS}
    rows = [f'{tokens[user.file]},{user.name},{user.name},"{",".join(user.groups)}"' for user in USERS]
    write_private(tokens_file(layout), "\n".join(rows) + "\n")
    for user in USERS:
        write_private(kubeconfig(layout, user.file), json.dumps(_kubeconfig(layout, tokens[user.file]), indent=2))


def key(layout: Layout, name: str) -> Path:
    return layout.run / f"{name}.key"


def certificate(layout: Layout, name: str) -> Path:
    return layout.run / f"{name}.crt"


def authority(layout: Layout) -> Path:
    return certificate(layout, "authority")


def authority_base64(layout: Layout) -> str:
    return base64.b64encode(authority(layout).read_bytes()).decode()


def kubeconfig(layout: Layout, user: str) -> Path:
    return layout.run / f"{user}.kubeconfig"


def tokens_file(layout: Layout) -> Path:
    return layout.run / "tokens.csv"


def write_private(path: Path, text: str) -> None:
    """Readable by the owner only, from the first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _authority(layout: Layout) -> None:
    run(
        [*_request(layout, "authority", "/CN=headway-test-cluster"), "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    )


def _certificate(
    layout: Layout, name: str, *, subject: str, names: Sequence[str] = (), addresses: Sequence[str] = ()
) -> None:
    """A key and a certificate for it that the authority signed."""
    known = [*(f"DNS:{each}" for each in names), *(f"IP:{each}" for each in addresses)]
    extensions = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth,clientAuth"]
    if known:
        extensions += ["-addext", f"subjectAltName={','.join(known)}"]
    signer = ["-CA", str(authority(layout)), "-CAkey", str(key(layout, "authority"))]
    run([*_request(layout, name, subject), *signer, *extensions])


def _request(layout: Layout, name: str, subject: str) -> list[str]:
    made = ["-keyout", str(key(layout, name)), "-out", str(certificate(layout, name))]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    return ["openssl", "req", "-x509", *curve, "-subj", subject, "-days", str(_NUM_DAYS), *made]


def _kubeconfig(layout: Layout, token: str) -> dict[str, Any]:
    cluster = {"server": API_URL, "certificate-authority-data": authority_base64(layout)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "headway", "cluster": cluster}],
        "users": [{"name": "headway", "user": {"token": token}}],
        "contexts": [{"name": "headway", "context": {"cluster": "headway", "user": "headway"}}],
        "current-context": "headway",
    }
