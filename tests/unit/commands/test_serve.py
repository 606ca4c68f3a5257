"""``headway serve`` where nothing is to be served yet: its settings, and taking an application away."""

from __future__ import annotations

import pytest

from orchestrator.commands.serve import parse_settings
from orchestrator.errors import UsageError


def test_settings_have_yamls_values() -> None:
    found = parse_settings(["max_batch=16", "request_timeout_s=2.5", "store_cache=null", "words=a=b"])
    assert found == {"max_batch": 16, "request_timeout_s": 2.5, "store_cache": None, "words": "a=b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch", "is not NAME=VALUE"),
        ("=3", "is not NAME=VALUE"),
        ("num_replicas=3", "--replicas says it"),
        ("channel=x", "--channel says it"),
        ("max_batch=[1", "is not a value that YAML can read"),
        ("replicas=2", "--replicas says it"),
        ("route_prefix=/x", "--route-prefix says it"),
        ("poll_s=2026-01-01", "is read as datetime.date"),
        ("poll_s=.inf", "is read as inf"),
    ],
)
def test_settings_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_settings([text])
