"""Keeps Headway's own packages findable where the working directory holds folders of the same names.

Ray puts a job's working directory first on ``sys.path``, so a user's folder ``workloads/`` would be imported in
place of Headway's. :func:`pin` looks these two names up beside this file, and leaves all other names alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_PACKAGES = frozenset({"orchestrator", "workloads"})
_ROOT = str(Path(__file__).resolve().parents[1])


class _OwnPackages:
    """A meta path finder for the two top-level names."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [_ROOT]) if name in _PACKAGES else None


def pin() -> None:
    """Install the finder. Called first by the command line, and by Ray in every worker process."""
    if not any(isinstance(finder, type) and finder.__name__ == "_OwnPackages" for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnPackages)
