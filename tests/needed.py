"""What some tests need and an installation does not bring."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacks(what: str, remedy: str) -> NoReturn:
    """End a test that needs what is not here: a skip with its reason; in CI, which has it, a failure."""
    message = f"This needs {what}, which is not on this machine: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
