"""Running a program to its end, with an error that shows what it said."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable


def run(
    command: list[str],
    *,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    timeout_s: float = 600.0,
) -> str:
    """Its standard output.

    Raises:
        EnvironmentUnusable: it is not there, failed, or took longer than ``timeout_s``.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            env=None if environment is None else dict(environment),
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except FileNotFoundError as e:
        raise EnvironmentUnusable(
            f"{command[0]} is not installed.", next_step="Install it, or run: make cluster"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise EnvironmentUnusable(f"`{shown(command)}` took more than {timeout_s:.0f} s.") from e
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise EnvironmentUnusable(f"`{shown(command)}` failed with {done.returncode}:\n  {said}")
    return done.stdout


def succeeds(command: list[str], *, timeout_s: float = 30.0) -> bool:
    """Whether it ended with 0."""
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout_s).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def shown(command: list[str]) -> str:
    words = " ".join(command)
    return words if len(words) <= 300 else words[:297] + "…"
