import json

import httpx
import pytest

from orchestrator.errors import TargetError, TimedOut, UsageError
from orchestrator.package import Package
from orchestrator.render import JobRequest
from orchestrator.targets.base import Capacity, JobState
from orchestrator.targets.jobs_api import JobsApiTarget, capacity_of

URL = "http://127.0.0.1:8265"
REQUEST = JobRequest(submission_id="run-1-00001", entrypoint="headway run r.yaml", runtime_env={}, metadata={"a": "b"})
PACKAGE = Package(digest="ab", data=b"zip", skipped=())


class FakeRay:
    """Answers by method and path; each answer is used once, the last one for good."""

    def __init__(self, **routes):
        self.routes = {key: list(value) for key, value in routes.items()}
        self.seen = []
        self.slept = []

    def __call__(self, request):
        key = f"{request.method} {request.url.path}"
        self.seen.append((key, request))
        answers = self.routes[key]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return httpx.Response(status, text=body if isinstance(body, str) else json.dumps(body))

    def target(self, token="", clock=None):
        now = iter(range(10_000))
        return JobsApiTarget(
            URL,
            token=token,
            transport=httpx.MockTransport(self),
            sleep=self.slept.append,
            clock=clock or (lambda: float(next(now))),
        )


def fake(routes):
    return FakeRay(**routes)


def test_submitting_posts_the_very_request():
    ray = fake({"POST /api/jobs/": [(200, {"submission_id": "run-1-00001"})]})
    submission = ray.target().submit(REQUEST)
    assert submission.created
    assert json.loads(ray.seen[0][1].content) == REQUEST.model_dump()


def test_a_package_is_uploaded_only_where_it_is_missing():
    routes = {"POST /api/jobs/": [(200, {})], "PUT /api/packages/gcs/_ray_pkg_ab.zip": [(200, "")]}
    missing = fake({**routes, "GET /api/packages/gcs/_ray_pkg_ab.zip": [(404, "no")]})
    missing.target().submit(REQUEST, PACKAGE)
    assert [key.split()[0] for key, _ in missing.seen] == ["GET", "PUT", "POST"]
    assert missing.seen[1][1].content == b"zip"
    there = fake({**routes, "GET /api/packages/gcs/_ray_pkg_ab.zip": [(200, "")]})
    there.target().submit(REQUEST, PACKAGE)
    assert [key.split()[0] for key, _ in there.seen] == ["GET", "POST"]


def test_an_id_that_exists_is_told_apart():
    text = "Traceback…\nValueError: Job with submission_id run-1-00001 already exists. Please use a different one.\n."
    submission = fake({"POST /api/jobs/": [(500, text)]}).target().submit(REQUEST)
    assert not submission.created
    assert submission.submission_id == "run-1-00001"


def test_submitting_waits_for_the_agent():
    ray = fake({"POST /api/jobs/": [(500, "No available agent to submit job"), (200, {})]})
    assert ray.target().submit(REQUEST).created
    assert ray.slept == [1.0]


def test_an_agent_that_never_comes_times_out():
    ray = fake({"POST /api/jobs/": [(500, "No available agent to submit job")]})
    with pytest.raises(TimedOut, match=r"60 s.*dashboard_agent\.log"):
        ray.target().submit(REQUEST)


def test_a_refusal_names_the_last_line_of_the_traceback():
    ray = fake({"POST /api/jobs/": [(400, "Traceback\n  File x\nTypeError: entrypoint must be a string\n.")]})
    with pytest.raises(TargetError, match=r"400 to /api/jobs/: TypeError: entrypoint must be a string$"):
        ray.target().submit(REQUEST)


@pytest.mark.parametrize(
    ("details", "state", "exit_code"),
    [
        ({"status": "SUCCEEDED", "message": "ok", "driver_exit_code": 0}, JobState.SUCCEEDED, 0),
        ({"status": "FAILED", "message": "bad", "driver_exit_code": 3}, JobState.FAILED, 3),
        ({"status": "PENDING", "message": None}, JobState.PENDING, None),
    ],
)
def test_status(details, state, exit_code):
    status = fake({"GET /api/jobs/j": [(200, details)]}).target().status("j")
    assert (status.state, status.exit_code) == (state, exit_code)
    assert status.state.ended is (state is not JobState.PENDING)


def test_an_unknown_job():
    with pytest.raises(TargetError, match="has no job j"):
        fake({"GET /api/jobs/j": [(404, "Job j does not exist")]}).target().status("j")


def test_following_yields_only_what_is_new_and_ends_with_the_job():
    ray = fake(
        {
            "GET /api/jobs/j": [(200, {"status": s}) for s in ("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")],
            "GET /api/jobs/j/logs": [(200, {"logs": t}) for t in ("", "one\n", "one\n", "one\ntwo\n")],
        }
    )
    assert list(ray.target().follow("run-1", "j")) == ["one\n", "two\n"]
    assert ray.slept == [0.75, 0.5, 0.75]


def test_stop():
    ray = fake({"POST /api/jobs/j/stop": [(200, {"stopped": True}), (200, {"stopped": False})]})
    target = ray.target()
    assert target.stop("j")
    assert not target.stop("j")


def test_capacity_counts_live_nodes():
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 100.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0}},
    ]
    ray = fake({"GET /api/v0/nodes": [(200, {"data": {"result": {"result": nodes}}})]})
    assert ray.target().capacity() == Capacity(num_cpus=2.0, num_gpus=0.0, memory_bytes=100, gpu_kind=None)


def test_the_commonest_kind_of_gpu_counts():
    found = capacity_of(
        [
            {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0},
            {"CPU": 8.0, "GPU": 8.0, "accelerator_type:A100": 1.0},
        ]
    )
    assert found == Capacity(num_cpus=16.0, num_gpus=9.0, memory_bytes=None, gpu_kind="A100")


@pytest.mark.parametrize("version", ["2.60.0", "2.59.1", "3.0.0rc1"])
def test_a_version_that_is_new_enough(version):
    assert fake({"GET /api/version": [(200, {"ray_version": version})]}).target().ray_version() == version


@pytest.mark.parametrize("version", ["2.59.0", "2.9.3", ""])
def test_a_version_that_is_too_old(version):
    with pytest.raises(TargetError, match=r"needs 2\.59\.1 or newer"):
        fake({"GET /api/version": [(200, {"ray_version": version})]}).target().ray_version()


@pytest.mark.parametrize(
    "raised",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.WriteError("broken"),
        httpx.RemoteProtocolError("half an answer"),
        httpx.TooManyRedirects("round"),
        httpx.ProxyError("proxy"),
        httpx.DecodingError("gzip"),
        httpx.InvalidURL("url"),
    ],
)
def test_no_exception_of_httpx_leaves(raised):
    with pytest.raises(TargetError, match=r"cannot be reached .*headway up"):
        fake({"GET /api/jobs/j": [raised]}).target().status("j")


@pytest.mark.parametrize("call", ["ray_version", "capacity"])
def test_something_else_on_that_port(call):
    ray = fake({"GET /api/version": [(200, "<html>")], "GET /api/v0/nodes": [(200, "<html>")]})
    with pytest.raises(TargetError, match="not a Ray dashboard"):
        getattr(ray.target(), call)()


def test_a_token_is_sent_and_its_refusal_named():
    ray = fake({"GET /api/jobs/j": [(401, "no")]})
    with pytest.raises(TargetError, match="RAY_AUTH_TOKEN"):
        ray.target(token="t0k").status("j")
    assert ray.seen[0][1].headers["authorization"] == "Bearer t0k"


@pytest.mark.parametrize("url", ["127.0.0.1:8265", "ray://head:10001", "http://"])
def test_an_address_that_is_none(url):
    with pytest.raises(UsageError, match="not the address of a Ray dashboard"):
        JobsApiTarget(url)


def test_runs_are_known_by_the_newest_of_their_jobs():
    def job(submission_id, run, start_time):
        metadata = {"headway_run": run} if run else None
        return {"submission_id": submission_id, "metadata": metadata, "start_time": start_time}

    jobs = [job("a-2", "a", 20), job("b-1", "b", 30), job("a-1", "a", 10), job("raysubmit_1", None, 40)]
    assert fake({"GET /api/jobs/": [(200, jobs)]}).target().runs() == {"a": "a-2", "b": "b-1"}


def test_a_list_of_jobs_in_an_unknown_form():
    with pytest.raises(TargetError, match="lists its jobs in an unknown form"):
        fake({"GET /api/jobs/": [(200, [{"metadata": {"headway_run": "a"}}])]}).target().runs()
