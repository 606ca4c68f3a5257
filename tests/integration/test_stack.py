"""The embedded stack for real: Ray and SeaweedFS on ports that no other stack of this machine uses.

Ray is started three times in all, since each start costs seconds.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from orchestrator import package as packaging
from orchestrator.commands import doctor
from orchestrator.errors import EnvironmentUnusable
from orchestrator.render import JobRequest, package_uri
from orchestrator.store import open_store
from orchestrator.store.probe import require_conditional_writes
from orchestrator.targets import local, ports, processes
from orchestrator.targets import stack as stacks
from orchestrator.targets.base import JobState
from orchestrator.targets.jobs_api import JobsApiTarget
from orchestrator.targets.serve_api import ServeApi

APPLICATION = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    async def __call__(self, request):
        return "hello from serve"

app = Hello.bind()
"""


def quiet(text):
    pass


def free_options():
    chosen = []
    for _ in range(2):
        chosen.append(ports.choose([], taken=chosen, seed=secrets.randbits(32)))
    return local.StackOptions(dashboard_port=chosen[0], serve_port=chosen[1])


def wait_for(condition, timeout_s=300.0):
    assert processes.wait_until(condition, timeout_s=timeout_s, ended=lambda: False)


@pytest.fixture(scope="module")
def options():
    return free_options()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("project") / ".headway"


@pytest.fixture(scope="module")
def stack(directory, options):
    began_s = time.monotonic()
    stack = local.up(directory, options, quiet)
    print(f"up in {time.monotonic() - began_s:.1f} s")
    yield stack
    local.down(directory, quiet)


@pytest.fixture
def store(stack, monkeypatch):
    environ = dict(os.environ)
    stack.apply_to(environ)
    for name in set(os.environ) - set(environ):
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return open_store()


@pytest.fixture
def target(stack):
    return JobsApiTarget(stack.dashboard_url)


def job(name, entrypoint, **runtime_env):
    return JobRequest(submission_id=name, entrypoint=entrypoint, runtime_env=runtime_env, metadata={})


def test_up_again_finds_it_up(stack, directory, options):
    said = []
    assert local.up(directory, options, said.append) == stack
    assert said == [f"Already up: dashboard {stack.dashboard_url}"]


def test_it_is_found_from_a_folder_below(stack, directory):
    below = directory.parent / "a" / "b"
    below.mkdir(parents=True)
    assert stacks.find(below) == stack
    assert stacks.running(stack)


def test_only_the_owner_reads_the_keys(stack, directory):
    for path in (directory / "stack.json", directory / "s3" / "s3.json"):
        assert path.stat().st_mode & 0o077 == 0


def test_the_store_enforces_conditional_writes(store):
    require_conditional_writes(store)
    store.create("kept", b"across restarts")


def test_a_job_runs_in_the_packaged_directory(target, tmp_path):
    (tmp_path / "hello.txt").write_text("hello from the package\n")
    package = packaging.package(tmp_path)
    request = job("hello-1", "cat hello.txt && echo $HEADWAY_STORE", working_dir=package_uri(package.digest))
    assert target.submit(request, package).created
    text = "".join(target.follow("", "hello-1"))
    assert "hello from the package" in text
    assert stacks.STORE in text
    status = target.status("hello-1")
    assert (status.state, status.exit_code) == (JobState.SUCCEEDED, 0)
    assert not target.submit(request, package).created


def test_headway_itself_is_on_a_jobs_path(target):
    target.submit(job("path-1", "command -v ray && exit 3"))
    assert os.path.dirname(sys.executable) in "".join(target.follow("", "path-1"))
    status = target.status("path-1")
    assert (status.state, status.exit_code) == (JobState.FAILED, 3)


def test_rays_own_command_line_needs_no_settings(stack, tmp_path):
    (tmp_path / "hello.txt").write_text("hello from ray's own package\n")
    said = subprocess.run(
        ["ray", "job", "submit", "--address", stack.dashboard_url, "--working-dir", ".", "--", "cat", "hello.txt"],
        cwd=tmp_path,
        env={"PATH": os.path.dirname(sys.executable) + ":/usr/bin:/bin", "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    assert "hello from ray's own package" in said.stdout


def test_a_stopped_job_gets_its_grace_period(target):
    saving = "trap 'sleep 4; echo saved; exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    target.submit(job("stop-1", saving))
    wait_for(lambda: "ready" in target.logs("", "stop-1"))
    assert target.stop("stop-1")
    assert "saved" in "".join(target.follow("", "stop-1"))  # Ray's own grace period is 3 s
    assert target.status("stop-1").state is JobState.STOPPED


def test_capacity_leaves_room_for_serving_beside_two_workers(target):
    capacity = target.capacity()
    assert capacity.num_cpus >= 3
    assert capacity.memory_bytes


def test_two_applications_are_served_and_one_is_taken_away(stack, target, tmp_path):
    (tmp_path / "application.py").write_text(APPLICATION)
    package = packaging.package(tmp_path)
    target.submit(job("upload-1", "true", working_dir=package_uri(package.digest)), package)
    serve = ServeApi(stack.dashboard_url)
    began_s = time.monotonic()
    for name in ("one", "two"):
        serve.deploy(
            {
                "name": name,
                "route_prefix": f"/{name}",
                "import_path": "application:app",
                "runtime_env": {"working_dir": package_uri(package.digest)},
            },
            port=stack.ray_ports.serve,
        )
    for name in ("one", "two"):
        serve.wait_until_answering(name, f"{stack.serve_url}/{name}", timeout_s=300)
    print(f"two applications answer after {time.monotonic() - began_s:.1f} s")
    serve.remove("one")
    wait_for(lambda: serve.status("one").state == "NOT_STARTED")
    assert serve.status("two").state == "RUNNING"


def test_the_doctor_finds_it_well(stack, store, directory):
    found = {
        each.name: each
        for each in doctor.checks(directory=directory, ports={}, store_uri=store.uri, ray_url=stack.dashboard_url)
    }
    assert found["store"].ok, found["store"]
    assert found["ray cluster"].ok, found["ray cluster"]


def test_a_taken_port_is_named_with_its_holder(tmp_path, options):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = replace(options, dashboard_port=listener.getsockname()[1], serve_port=free_options().serve_port)
        with pytest.raises(EnvironmentUnusable, match=rf"taken by process {os.getpid()} .*--dashboard-port"):
            local.up(tmp_path / ".headway", taken, quiet)
    assert processes.marked(stacks.stack_id(tmp_path / ".headway")) == []


def test_a_killed_server_is_repaired_and_its_data_is_there(stack, directory, options, store):
    os.kill(stack.s3_process.pid, signal.SIGKILL)
    wait_for(lambda: not stacks.running(stack))
    repaired = local.up(directory, options, quiet)
    assert stacks.running(repaired)
    assert (repaired.keys, repaired.s3_ports) == (stack.keys, stack.s3_ports)
    assert store.get("kept") == b"across restarts"


def test_down_ends_everything_and_keeps_the_data(stack, directory, target):
    target.submit(job("left-1", "trap '' TERM; echo ready; while true; do sleep 0.1; done"))
    wait_for(lambda: "ready" in target.logs("", "left-1"))
    began_s = time.monotonic()
    local.down(directory, quiet)
    print(f"down in {time.monotonic() - began_s:.1f} s, one process killed")
    assert processes.marked(stack.id) == []
    assert not stack.temp_directory.exists()
    after = stacks.find(directory.parent)
    assert not stacks.running(after)
    assert after.keys == stack.keys
    assert any((directory / "s3").iterdir())
    local.down(directory, quiet)  # again, with nothing left
    local.down(directory, quiet, remove_data=True)
    assert not directory.exists()


def test_ctrl_c_half_way_leaves_nothing(tmp_path):
    directory = tmp_path / ".headway"
    marker = stacks.stack_id(directory)
    chosen = free_options()
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        "from pathlib import Path; from orchestrator.targets import local; "
        f"local.up(Path({str(directory)!r}), local.StackOptions(dashboard_port={chosen.dashboard_port}, "
        f"serve_port={chosen.serve_port}), print)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as child:
        wait_for(lambda: len(processes.marked(marker)) >= 4)
        child.send_signal(signal.SIGINT)
        try:
            _, said = child.communicate(timeout=300)
        finally:
            child.kill()
    assert "KeyboardInterrupt" in said
    assert child.returncode != 0
    assert processes.marked(marker) == []
    assert not stacks.load(directory).temp_directory.exists()
