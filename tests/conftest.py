"""What ``make test`` leaves out: tests that take minutes each, which ``make test-all`` and ``make test-faults`` run."""

from __future__ import annotations

import os

import pytest

IS_FULL = os.environ.get("HEADWAY_TESTS", "quick") == "all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``HEADWAY_TESTS=all``, leave out the tests that are marked ``full``."""
    left_out = [] if IS_FULL else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
