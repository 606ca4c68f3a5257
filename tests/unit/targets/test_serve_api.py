import json

import httpx
import pytest

from orchestrator.errors import TargetError, TimedOut
from orchestrator.targets.serve_api import ApplicationStatus, ServeApi, deployed, gist, merged

NOT_STARTED = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}
OTHER = {"name": "other", "route_prefix": "/other", "import_path": "o:app"}
MINE = {"name": "mine", "route_prefix": "/", "import_path": "m:app"}


def details(*configs, status="RUNNING", message=""):
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000, "root_path": ""},
        "applications": {
            each["name"]: {"status": status, "message": message, "deployed_app_config": each} for each in configs
        },
    }


class FakeServe:
    def __init__(self, *answers, put_status=200, endpoint_status=200):
        self.answers = list(answers)
        self.put_status = put_status
        self.endpoint_status = endpoint_status
        self.put = []

    def __call__(self, request):
        if request.url.port == 8000:
            return httpx.Response(self.endpoint_status)
        if request.method == "PUT":
            self.put.append(json.loads(request.content))
            return httpx.Response(self.put_status, text="ValueError: bad import path")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return httpx.Response(200, json=answer)

    def api(self):
        now = iter(range(10_000))
        return ServeApi(
            "http://127.0.0.1:8265",
            token="",
            transport=httpx.MockTransport(self),
            sleep=lambda s: None,
            clock=lambda: float(next(now)),
        )


def test_the_first_application_says_where_serve_listens():
    serve = FakeServe(NOT_STARTED)
    serve.api().deploy(MINE, port=8123)
    assert serve.put == [{"http_options": {"host": "127.0.0.1", "port": 8123}, "applications": [MINE]}]


def test_others_stay_and_a_running_proxy_stays_where_it_is():
    serve = FakeServe(details(OTHER))
    serve.api().deploy(MINE, port=8123)
    assert serve.put == [{"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [OTHER, MINE]}]


def test_removing_leaves_the_others():
    serve = FakeServe(details(OTHER, MINE))
    serve.api().remove("mine")
    assert serve.put[0]["applications"] == [OTHER]


def test_removing_what_is_not_there_sends_nothing():
    serve = FakeServe(details(OTHER))
    serve.api().remove("mine")
    assert serve.put == []


def test_an_application_on_its_way_out_is_not_deployed_again():
    assert deployed(details(OTHER, status="DELETING")) == []


def test_merging_replaces_by_name():
    assert merged([OTHER, MINE], {**MINE, "route_prefix": "/new"}) == [OTHER, {**MINE, "route_prefix": "/new"}]


def test_status():
    api = FakeServe(details(MINE, status="DEPLOYING", message="soon")).api()
    assert api.status("mine") == ApplicationStatus(state="DEPLOYING", message="soon")
    assert api.status("none") == ApplicationStatus(state="NOT_STARTED", message="")


def test_waiting_ends_when_it_answers():
    serve = FakeServe(NOT_STARTED, details(MINE, status="DEPLOYING"), details(MINE))
    serve.api().wait_until_answering("mine", "http://127.0.0.1:8000/", timeout_s=30)


def test_a_failed_deployment_is_told_at_once():
    serve = FakeServe(details(MINE, status="DEPLOY_FAILED", message="ImportError: no module"))
    with pytest.raises(TargetError, match="ImportError: no module"):
        serve.api().wait_until_answering("mine", "http://127.0.0.1:8000/", timeout_s=30)


NESTED = """Deploying app 'mine' failed with exception:
Traceback (most recent call last):
  File "application_state.py", line 926, in _reconcile_build_app_task
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(RuntimeError): ray::build_serve_application() (pid=1)
RuntimeError: Traceback (most recent call last):
  File "app.py", line 209, in build
    raise UsageError(
               ^^^^^^
"""


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", ""),
        ("The deployment 'x' is\n  waiting: for a CPU", "The deployment 'x' is waiting: for a CPU"),
        (
            NESTED + "orchestrator.errors.UsageError: It is old. Name another.",
            "It is old. Name another.",
        ),
        (NESTED + "pydantic.Invalid: 1 fault\nreplicas\n  too few", "pydantic.Invalid: 1 fault replicas too few"),
    ],
)
def test_of_a_traceback_what_was_raised_is_told(message, said):
    assert gist(message) == said


def test_a_long_message_is_told_by_its_end():
    assert gist("x" * 2000 + " no memory").endswith("x no memory")
    assert len(gist("x" * 2000)) == 500


def test_one_that_runs_but_does_not_answer_times_out():
    serve = FakeServe(details(MINE), endpoint_status=503)
    with pytest.raises(TimedOut, match="within 5 s; Serve says RUNNING"):
        serve.api().wait_until_answering("mine", "http://127.0.0.1:8000/", timeout_s=5)


def test_a_refused_deployment():
    with pytest.raises(TargetError, match="bad import path"):
        FakeServe(NOT_STARTED, put_status=400).api().deploy(MINE)
