"""A folder that commands run in, and a store that this process sees as they do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.store import Store
from tests.command_line import start

_SEEN = ("AWS_", "HEADWAY_", "RAY_")


@dataclass(frozen=True, kw_only=True)
class ProjectFolder:
    directory: Path
    target: str
    settings: dict[str, str]
    store: Store
    name: str

    def command(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Start ``headway`` in the folder, with the stack's settings and these."""
        return start(*arguments, directory=self.directory, settings={**self.settings, **settings})


@contextmanager
def settings_of(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """What of a stack's environment reaches its store and its Ray; it is this process's environment meanwhile."""
    settings = {key: value for key, value in environment.items() if key.startswith(_SEEN)}
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith(("AWS_", "RAY_"))]:
            patch.delenv(key)
        for key, value in settings.items():
            patch.setenv(key, value)
        yield settings
