"""What importing Headway costs: no module of orchestrator pulls in what only training needs."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator

HEAVY = ("ray", "torch", "deepspeed", "transformers")
# They read and write torch's own tensors; the command line imports none of them.
ADAPTERS = (
    "orchestrator.dataset.torch",
    *(
        f"orchestrator.checkpoint.{name}"
        for name in (
            "agreement", "checkpointer", "commit", "image", "optimizers", "random_state", "resume", "save", "tensors",
            "zero",
        )
    ),
)  # fmt: skip
ROOT = Path(orchestrator.__file__).parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator.", onerror=lambda name: None)
    if not module.name.startswith(ADAPTERS)
)

PROGRAM = """
import importlib, json, sys
heavy = json.loads(sys.argv[2])
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    for package in heavy:
        if package in sys.modules:
            found.setdefault(package, name)
print(json.dumps(found))
"""


def test_there_is_something_to_import() -> None:
    assert {"orchestrator.plan", "orchestrator.sizing", "orchestrator.store.s3"} <= set(MODULES)


def test_importing_orchestrator_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MODULES), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "package: the module whose import brought it in"


@pytest.mark.parametrize("package", ["orchestrator", "workloads"])
def test_ray_serve_is_imported_only_under_workloads_serve(package: str) -> None:
    """Import-linter sees no further into a foreign package than its top, so this one contract is proved here."""
    offenders = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / package).rglob("*.py"))
        if "ray.serve" in _imported(path) and ROOT / "workloads" / "serve" not in path.parents
    ]
    assert offenders == []


def _imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, to two levels."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:2]) for name in names}
