import shlex

import pytest
from pydantic import ValidationError

from orchestrator import render

REQUEST = {
    "run_id": "code-lm-1a2b3c4d",
    "attempt": 2,
    "run_file": "run.yaml",
    "version": "0.1.0",
    "package_digest": "ab" * 32,
}


def test_the_request_is_what_ray_expects():
    request = render.job_request(**REQUEST, env_vars={"B": "2", "A": "1"})
    assert request.model_dump() == {
        "submission_id": "code-lm-1a2b3c4d-00002",
        "entrypoint": "headway run run.yaml",
        "runtime_env": {
            "working_dir": f"gcs://_ray_pkg_{'ab' * 32}.zip",
            "env_vars": {"A": "1", "B": "2"},
        },
        "metadata": {"headway_run": "code-lm-1a2b3c4d", "headway_attempt": "2", "headway_version": "0.1.0"},
    }


def test_a_path_with_spaces_stays_one_word():
    request = render.job_request(**{**REQUEST, "run_file": "my runs/it's; rm -rf .yaml"})
    assert shlex.split(request.entrypoint) == ["headway", "run", "my runs/it's; rm -rf .yaml"]


def test_a_repeat_has_an_id_of_its_own():
    assert render.job_request(**REQUEST, repeat=3).submission_id == "code-lm-1a2b3c4d-00002-3"


def test_without_a_package_there_is_no_working_directory():
    assert render.job_request(**{**REQUEST, "package_digest": None}).runtime_env == {}


def test_the_request_cannot_be_changed():
    with pytest.raises(ValidationError):
        render.job_request(**REQUEST).entrypoint = "other"
