"""``headway up`` and ``headway down``."""

from __future__ import annotations

from pathlib import Path

from orchestrator.reporter import Reporter, Result
from orchestrator.targets import local
from orchestrator.targets import stack as stacks
from orchestrator.targets.local import StackOptions
from orchestrator.targets.stack import FOLDER, Stack


def options(**ports: int | None) -> StackOptions:
    """Options with what was asked for, and defaults for the rest."""
    return StackOptions(**{name: port for name, port in ports.items() if port is not None})  # type: ignore[arg-type]


def up(directory: Path | None, wanted: StackOptions, reporter: Reporter) -> Result:
    stack = local.up(folder_of(directory), wanted, reporter.say)
    return facts(stack), "\n".join(
        [
            f"dashboard  {stack.dashboard_url}",
            f"store      {stack.store}",
            f"S3 server  {stack.endpoint_url} (keys in {stack.directory / 'stack.json'})",
            "stop it    headway down",
        ]
    )


def down(directory: Path | None, reporter: Reporter, *, remove_data: bool) -> Result:
    folder = folder_of(directory)
    local.down(folder, reporter.say, remove_data=remove_data)
    return {"directory": str(folder), "removed_data": remove_data}, ""


def facts(stack: Stack) -> dict[str, str]:
    return {
        "directory": str(stack.directory),
        "dashboard": stack.dashboard_url,
        "store": stack.store,
        "s3_endpoint": stack.endpoint_url,
        "ray_address": stack.ray_address,
        "endpoint": stack.serve_url,
    }


def folder_of(directory: Path | None) -> Path:
    """Where the stack lives: as asked, else that of this folder or one above it, else a new one here."""
    if directory is not None:
        return directory
    found = stacks.find(Path.cwd())
    return found.directory if found else Path.cwd() / FOLDER
