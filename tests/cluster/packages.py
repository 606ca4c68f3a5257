"""Debian packages that the cluster runs on, and the mirror that this machine takes them from."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from tests.cluster.shell import run
from tests.cluster.versions import DEBIAN_PACKAGES


def install_missing() -> list[str]:
    """Install with apt what is not there, and say what that was.

    Raises:
        EnvironmentUnusable: not Linux, not root, or apt failed.
    """
    if platform.system() != "Linux" or os.geteuid() != 0:
        raise EnvironmentUnusable(
            "The test cluster makes network namespaces and containers, which needs Linux and root.",
            next_step="Run it as root, or set KUBECONFIG to a cluster that is there",
        )
    missing = [package for package, proof in DEBIAN_PACKAGES.items() if not _is_installed(proof)]
    if not missing:
        return []
    if shutil.which("apt-get") is None:
        raise EnvironmentUnusable(
            f"The test cluster needs {', '.join(missing)}, and this machine has no apt-get.",
            next_step="Use Debian 12, or set KUBECONFIG to a cluster that is there",
        )
    print(f"Installing {', '.join(missing)}", flush=True)
    # Services that the packages start are not in the way: the cluster's have other sockets and networks.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "--quiet"], environment=environment)
    run(["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing], environment=environment)
    return missing


def release_name() -> str:
    """This machine's Debian release, such as ``bookworm``."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip('"')
    raise EnvironmentUnusable("/etc/os-release names no Debian release.", next_step="Use Debian 12")


def mirror(release: str) -> str:
    """The address from which apt takes the release's main component on this machine.

    Raises:
        EnvironmentUnusable: apt is configured with none.
    """
    targets = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"]
    )
    for line in targets.splitlines():
        words = line.split()
        if words[1:] == [release, "main"]:
            return words[0]
    raise EnvironmentUnusable(
        f"apt is configured with no repository that has the component main of {release}.",
        next_step="Add one to /etc/apt/sources.list, then run: apt-get update",
    )


def _is_installed(proof: str) -> bool:
    return Path(proof).exists() if proof.startswith("/") else shutil.which(proof) is not None
