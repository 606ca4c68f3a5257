from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import __version__
from orchestrator.errors import UsageError
from orchestrator.release.channels import ChannelStatus
from workloads.serve import app


def test_arguments_have_defaults_that_leave_room_for_training() -> None:
    settings = app.ServeSettings(model="lm")
    assert settings.num_cpus < 1
    assert settings.engine_settings().max_concurrent >= 1
    assert app.ServeSettings(model="lm", num_threads=3).engine_settings().num_threads == 3


@pytest.mark.parametrize(
    ("args", "field"),
    [({}, "model"), ({"model": "lm", "modle": 1}, "modle"), ({"model": "lm", "num_replicas": 0}, "num_replicas")],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=f"argument {field}"):
        app.build(args)


def test_another_version_of_headway_is_refused() -> None:
    app.build({"model": "lm", "headway": __version__})
    with pytest.raises(UsageError, match=f"holds Headway {__version__}, and the service was asked for by .*9.9.9"):
        app.build({"model": "lm", "headway": "9.9.9"})


def test_build_gives_an_application_without_a_cluster() -> None:
    assert type(app.build({"model": "lm", "num_replicas": "2"})).__name__ == "Application"


def test_the_cache_is_where_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", "/somewhere")
    assert app.cache_directory() == Path("/somewhere/versions")
    monkeypatch.delenv("HEADWAY_CACHE")
    assert app.cache_directory() == Path.home() / ".cache/headway/versions"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (ChannelStatus(), "No version released yet for lm."),
        (ChannelStatus(rejected={3: "NaN"}), "No version of lm can serve: version 3 was rejected: NaN"),
        (ChannelStatus(problem="down", rejected={3: "NaN"}), "No version of lm is loaded: down"),
    ],
)
def test_why_nothing_answers(status: ChannelStatus, message: str) -> None:
    assert app._why_nothing("lm", status) == message
