"""Programs that some tests need and an installation does not bring."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacks(program: str, remedy: str) -> NoReturn:
    """End a test whose program is not here: a skip with its reason; in CI, which installs it, a failure."""
    message = f"This needs {program}, which is not on this machine: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
