"""Where a node keeps what it downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.node_cache import cache_directory


def test_the_cache_is_where_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.home() / ".cache" / "headway"
    for value, expected in (("/somewhere", Path("/somewhere")), ("", usual)):
        monkeypatch.setenv("HEADWAY_CACHE", value)
        assert cache_directory() == expected
    monkeypatch.delenv("HEADWAY_CACHE")
    assert cache_directory() == usual
