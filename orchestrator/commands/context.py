"""Which store and which target a command works with."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable, UsageError
from orchestrator.store import Store, open_store
from orchestrator.store.s3 import PROMPT, STORE_VARIABLE, Patience
from orchestrator.targets import stack as stacks
from orchestrator.targets.jobs_api import JobsApiTarget
from orchestrator.targets.stack import Stack


def find_stack() -> Stack | None:
    """The embedded stack of this folder or one above it, if it runs."""
    stack = stacks.find(Path.cwd())
    return stack if stack is not None and stacks.running(stack) else None


def find_store(uri: str | None, *, patience: Patience = PROMPT) -> Store:
    """The store that ``--store`` or HEADWAY_STORE names, else the embedded stack's.

    Raises:
        UsageError: none is named and there is no stack here. EnvironmentUnusable: there is one, but it does not run.
    """
    if not uri and not os.environ.get(STORE_VARIABLE) and stacks.find(Path.cwd()) is not None:
        require_stack().apply_to(os.environ)
    return open_store(uri, patience=patience)


def find_target(name: str) -> JobsApiTarget:
    """The target that ``--target`` names.

    Raises:
        EnvironmentUnusable: local, and no stack runs here. UsageError: no such kind of target.
    """
    if name.startswith(("http://", "https://")):
        return JobsApiTarget(name)
    if name != "local":
        raise UsageError(f"--target {name!r} is not a target.", next_step="Give local, or http://… of a Ray dashboard.")
    return JobsApiTarget(require_stack().dashboard_url)


def require_stack() -> Stack:
    """The running embedded stack.

    Raises:
        EnvironmentUnusable: none runs here.
    """
    stack = stacks.find(Path.cwd())
    if stack is not None and not stacks.running(stack):
        raise EnvironmentUnusable(
            f"The embedded stack in {stack.directory} does not run.",
            next_step="Start it, with its data: headway up",
        )
    if stack is None:
        raise EnvironmentUnusable(
            f"No embedded stack runs in {Path.cwd()} or above it.",
            next_step="Start it (headway up), or name a cluster (--target http://…).",
        )
    return stack
