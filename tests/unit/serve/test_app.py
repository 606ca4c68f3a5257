from __future__ import annotations

from typing import Any

import pytest

from orchestrator import __version__
from orchestrator.errors import UsageError
from workloads.serve import app
from workloads.serve.replica import why_nothing
from workloads.serve.settings import ServeSettings


def test_arguments_have_defaults_that_leave_room_for_training() -> None:
    settings = ServeSettings(model="lm")
    assert settings.num_cpus < 1
    assert settings.engine_settings().max_batch >= 1
    assert ServeSettings(model="lm", num_threads=3).engine_settings().num_threads == 3


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


@pytest.mark.parametrize(
    ("problem", "rejected", "message"),
    [
        (None, {}, "No version released yet for lm."),
        (None, {3: "NaN"}, "No version of lm can serve: version 3 was rejected: NaN"),
        ("down", {3: "NaN"}, "No version of lm is loaded: down"),
    ],
)
def test_why_nothing_answers(problem: str | None, rejected: dict[int, str], message: str) -> None:
    assert why_nothing("lm", problem, rejected) == message


def test_replicas_are_as_many_as_said_or_grow_with_the_load() -> None:
    assert ServeSettings(model="lm", num_replicas=2).replicas() == {"num_replicas": 2}
    assert ServeSettings(model="lm", num_replicas=2, max_replicas=2).replicas() == {"num_replicas": 2}
    grown = ServeSettings(model="lm", num_replicas=2, min_replicas=1, max_replicas=4, max_batch=8)
    assert grown.replicas()["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "initial_replicas": 2,
        "target_ongoing_requests": 8,
    }


@pytest.mark.parametrize("args", [{"min_replicas": 2}, {"num_replicas": 3, "max_replicas": 2}])
def test_replicas_that_cannot_be_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="max_replicas"):
        app.build({"model": "lm", **args})


def test_a_canary_policy_is_taken_as_a_part() -> None:
    assert ServeSettings.model_validate({"model": "lm", "canary": {"min_requests": 5}}).canary.min_requests == 5
    with pytest.raises(UsageError, match=r"argument canary\.min_request:"):
        app.build({"model": "lm", "canary": {"min_request": 5}})
