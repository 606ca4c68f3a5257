"""An attempt as a job of Ray's Jobs API, and the ids that submissions get."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.document import NAME
from orchestrator.render import job_request, preparation_id, submission_id
from orchestrator.spec import MAX_NAME
from tests.unit.render.requests import DIGEST, attempt

MAX_RAY_JOB_NAME = 47  # KubeRay 1.6, controllers/ray/utils/constant.go
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

names = st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) <= MAX_NAME)
run_ids = st.builds("{}-{:08x}".format, names, st.integers(0, 2**32 - 1))


def test_the_request_is_what_ray_expects() -> None:
    request = job_request(attempt({"pip": ["einops==0.8.1"]}, env={"B": "2", "A": "1"}))
    assert request.body() == {
        "submission_id": "code-lm-1a2b3c4d-00002",
        "entrypoint": "headway run run.yaml --run code-lm-1a2b3c4d --edition 0",
        "runtime_env": {
            "working_dir": f"gcs://_ray_pkg_{DIGEST}.zip",
            "env_vars": {"A": "1", "B": "2", "HEADWAY_STORE": "s3://bucket/prefix"},
            "pip": ["einops==0.8.1"],
        },
        "metadata": {"headway_run": "code-lm-1a2b3c4d", "headway_attempt": "2", "headway_version": "0.1.0"},
    }


def test_a_path_with_spaces_stays_one_word() -> None:
    request = job_request(attempt(run_file="my runs/it's; rm -rf .yaml"))
    assert shlex.split(request.entrypoint)[:3] == ["headway", "run", "my runs/it's; rm -rf .yaml"]
    assert len(shlex.split(request.entrypoint)) == 7


def test_without_a_package_there_is_no_working_directory() -> None:
    assert job_request(attempt(package_digest=None)).runtime_env == {
        "env_vars": {"HEADWAY_STORE": "s3://bucket/prefix"}
    }


def test_the_request_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        job_request(attempt()).entrypoint = "other"


# -- submission ids


def test_a_repeat_has_an_id_of_its_own() -> None:
    assert attempt().submission_id == "code-lm-1a2b3c4d-00002"
    assert attempt(repeat=1).submission_id == "code-lm-1a2b3c4d-2-1"


def assert_ray_job_name(name: str) -> None:
    assert DNS_1035.fullmatch(name), name
    assert len(name) <= MAX_RAY_JOB_NAME, name


@given(run_id=run_ids, number=st.integers(1, 9_999))
@example(run_id=f"{'9' * MAX_NAME}-ffffffff", number=9_999)
def test_the_id_is_a_ray_jobs_name_up_to_attempt_9999(run_id: str, number: int) -> None:
    assert_ray_job_name(submission_id(run_id, number))


@given(run_id=run_ids, number=st.integers(1, 99), repeat=st.integers(1, 9))
@example(run_id=f"{'9' * MAX_NAME}-ffffffff", number=99, repeat=9)
def test_so_is_a_repeats_up_to_the_9th_of_attempt_99(run_id: str, number: int, repeat: int) -> None:
    assert_ray_job_name(submission_id(run_id, number, repeat=repeat))


fingerprints = st.from_regex("[0-9a-f]{16}", fullmatch=True)


@given(name=names, fingerprint=fingerprints, repeat=st.integers(0, 9))
@example(name="9" * MAX_NAME, fingerprint="f" * 16, repeat=9)
def test_the_id_of_a_preparation_is_a_ray_jobs_name_too(name: str, fingerprint: str, repeat: int) -> None:
    assert_ray_job_name(preparation_id(name, fingerprint, repeat=repeat))


@given(
    preparation=st.tuples(names, fingerprints, st.integers(0, 99)),
    attempt=st.tuples(run_ids, st.integers(1, 999), st.integers(0, 99)),
)
@example(preparation=("a", "0000000100000000", 1), attempt=("data-a-00000001", 1, 0))
@example(preparation=("a", "0000000100000000", 1), attempt=("data-a-00000001", 1, 1))
def test_no_run_has_the_id_of_a_preparation(preparation: tuple[str, str, int], attempt: tuple[str, int, int]) -> None:
    name, fingerprint, repeat = preparation
    run_id, number, again = attempt
    assert preparation_id(name, fingerprint, repeat=repeat) != submission_id(run_id, number, repeat=again)


@given(
    one=st.tuples(run_ids, st.integers(1, 999), st.integers(0, 99)),
    other=st.tuples(run_ids, st.integers(1, 999), st.integers(0, 99)),
)
@example(one=("a-00000001", 1, 0), other=("a-00000001", 1, 1))
@example(one=("0-00000001", 1, 0), other=("r0-00000001", 1, 0))
@example(one=("a-00000001", 12, 3), other=("a-00000001", 1, 23))
def test_two_submissions_have_two_ids(one: tuple[str, int, int], other: tuple[str, int, int]) -> None:
    ids = {submission_id(run_id, number, repeat=repeat) for run_id, number, repeat in (one, other)}
    assert len(ids) == len({one, other})
