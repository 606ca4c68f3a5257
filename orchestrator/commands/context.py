"""Which store and which target a command works with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import EnvironmentUnusable, UsageError
from orchestrator.store import Store, open_store
from orchestrator.store.s3 import PROMPT, STORE_VARIABLE, Patience
from orchestrator.target_settings import DEFAULT_FILE, TargetSettings, load_settings
from orchestrator.targets import stack as stacks
from orchestrator.targets.base import Target
from orchestrator.targets.jobs_api import JobsApiTarget
from orchestrator.targets.stack import Stack

if TYPE_CHECKING:
    from orchestrator.targets.kubernetes.target import KubernetesTarget

KUBERNETES = "kubernetes"


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


def find_target(name: str, store_uri: str | None, *, patience: Patience = PROMPT) -> Target[Any]:
    """The target that ``--target`` names.

    Args:
        store_uri: of ``--store``, for a target that keeps code and logs in the store.
        patience: with that store.

    Raises:
        EnvironmentUnusable: local, and no stack runs here; or no cluster can be found. UsageError: no such kind of
        target. SpecError: the target's settings say something that is not allowed.
    """
    return find_kubernetes(name, store_uri, patience=patience) if is_kubernetes(name) else find_ray(name)


def find_ray(name: str) -> JobsApiTarget:
    """The Ray cluster that ``--target`` names."""
    if name.startswith(("http://", "https://")):
        return JobsApiTarget(name, flag=f" --target {name}")
    if name != "local":
        raise UsageError(
            f"--target {name!r} is not a target here.",
            next_step="Give local, http://… of a Ray dashboard, kubernetes, or kubernetes:PATH of a target.yaml.",
        )
    return JobsApiTarget(require_stack().dashboard_url)


def is_kubernetes(name: str) -> bool:
    return name.partition(":")[0] == KUBERNETES


def find_kubernetes(name: str, store_uri: str | None, *, patience: Patience = PROMPT) -> KubernetesTarget:
    """The Kubernetes cluster of a ``kubernetes`` or ``kubernetes:PATH`` target."""
    from orchestrator.targets.kubernetes.client import KubernetesClient
    from orchestrator.targets.kubernetes.target import KubernetesTarget

    settings = kubernetes_settings(name)
    client = KubernetesClient(settings.namespace, context=settings.context)
    return KubernetesTarget(
        settings, lambda: find_store(store_uri, patience=patience), client=client, flag=f" --target {name}"
    )


def kubernetes_settings(name: str) -> TargetSettings:
    """The settings that a ``kubernetes`` or ``kubernetes:PATH`` target names."""
    _, colon, path = name.partition(":")
    if colon and not path:
        raise UsageError(f"--target {name!r} names no file.", next_step=f"Write {KUBERNETES}, or {KUBERNETES}:PATH.")
    return load_settings(Path(path) if path else DEFAULT_FILE)


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
