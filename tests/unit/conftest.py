"""Fixtures for tests that open no socket."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.unit.fakes import MemoryStore

# A deadline per example would fail on a busy machine, not on a wrong program.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture
def memory_store() -> MemoryStore:
    return MemoryStore(prefix="headway")
