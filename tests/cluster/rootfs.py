"""The root file system of the test image: Debian, this machine's Python at its own path, and a user for Ray.

Headway and its virtual environment are not in it: they are mounted, so that a changed line needs no new image.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.cluster import packages
from tests.cluster.layout import REPOSITORY
from tests.cluster.shell import run

USER_ID = 1000
HOME = "/home/ray"
EXTENSIONS = "/opt/headway/torch-extensions"
"""DeepSpeed's CPU communication op, built. Its folder must be writable: PyTorch takes a lock in it at each use."""

DEBIAN_PACKAGES = (
    "ca-certificates",
    "g++",  # PyTorch asks the compiler for its version even where the op is built
    "iproute2",
    "procps",
    "wget",  # KubeRay's probes
    # what a Python built from source is linked with
    "libbz2-1.0",
    "libffi8",
    "liblzma5",
    "libncursesw6",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "zlib1g",
)


def environment() -> dict[str, str]:
    """What every container of the image starts with."""
    scripts = REPOSITORY / ".venv" / "bin"
    return {
        "PATH": f"{scripts}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": EXTENSIONS,
        # Else gloo takes the address that the host's name resolves to, which in a pod may be loopback.
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def make(root: Path) -> None:
    """Fill ``root``, which must not exist. About a minute and a half, most of it apt and the compiler."""
    release = packages.release_name()
    wanted = DEBIAN_PACKAGES + (("python3",) if _is_system_python() else ())
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(wanted)}", release, str(root)]
    run([*command, packages.mirror(release)])
    for useless in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / useless, ignore_errors=True)
    if not _is_system_python():
        _copy_python(root)
    _add_user(root)
    _build_op(root)
    (root / REPOSITORY.relative_to("/")).mkdir(parents=True, exist_ok=True)


def _is_system_python() -> bool:
    return sys.base_prefix == "/usr"


def _copy_python(root: Path) -> None:
    """At the same path, because the virtual environment's ``python`` is a link to it."""
    source = Path(sys.base_prefix)
    target = root / source.relative_to("/")
    left_out = shutil.ignore_patterns("test", "site-packages", "*.a")
    shutil.copytree(source, target, symlinks=True, ignore=left_out)
    for folder in target.parents:
        if folder == root:
            break
        folder.chmod(0o755)


def _add_user(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write(f"ray:x:{USER_ID}:{USER_ID}::{HOME}:/bin/bash\n")
    with (root / "etc/group").open("a") as file:
        file.write(f"ray:x:{USER_ID}:\n")
    home = root / HOME.lstrip("/")
    home.mkdir(parents=True)
    os.chown(home, USER_ID, USER_ID)


def _build_op(root: Path) -> None:
    target = root / EXTENSIONS.lstrip("/")
    target.mkdir(parents=True)
    scripts = str(REPOSITORY / ".venv" / "bin")
    found = os.environ | {"TORCH_EXTENSIONS_DIR": str(target), "DS_ACCELERATOR": "cpu"}
    found["PATH"] = f"{scripts}:{found['PATH']}"
    run([sys.executable, "-m", "workloads.build_ops"], environment=found, directory=REPOSITORY)
    for path in (target, *target.rglob("*")):
        os.chown(path, USER_ID, USER_ID)
