"""Fixtures for tests that open no socket."""

from __future__ import annotations

import pytest

from tests.unit.fakes import MemoryStore


@pytest.fixture
def memory_store() -> MemoryStore:
    return MemoryStore(prefix="headway")
