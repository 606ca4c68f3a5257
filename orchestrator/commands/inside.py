"""The door from the command line into ``workloads``, for what is executed inside a Ray job."""

from __future__ import annotations

import importlib
from types import ModuleType

from orchestrator.errors import EnvironmentUnusable


def modules_of_workloads(*names: str, does: str, elsewhere: str) -> list[ModuleType]:
    """Modules of ``workloads``, by name: orchestrator imports nothing of it.

    Args:
        does: what the command does with them, for the error.
        elsewhere: the command that has it done on another machine.

    Raises:
        EnvironmentUnusable: this installation lacks what they need.
    """
    try:
        return [importlib.import_module(f"workloads.{name}") for name in names]
    except ModuleNotFoundError as e:
        raise EnvironmentUnusable(
            f"{does}, and this installation lacks {e.name}.",
            next_step=f"Install it: pip install 'headway[train]'. {elsewhere}",
        ) from e
