import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import stack as stacks
from orchestrator.targets.processes import Identity
from orchestrator.targets.ray_head import RayPorts, head_command, head_environment
from orchestrator.targets.seaweedfs import Keys, S3Ports


@pytest.fixture
def stack(tmp_path):
    directory = tmp_path / ".headway"
    directory.mkdir()
    return stacks.Stack(
        id="0123456789ab",
        directory=directory.resolve(),
        keys=Keys(access_key="K", secret_key="S"),
        s3_ports=S3Ports(s3=8333, master=20000, volume=20001, filer=20002, admin=20003),
        ray_ports=RayPorts(gcs=6379, dashboard=8265, serve=8000, client=20004, agent=20005),
        s3_process=Identity(pid=10, start_ticks=20),
    )


def test_the_file_gives_the_same_stack_back(stack):
    stacks.save(stack)
    assert stacks.load(stack.directory) == stack
    assert (stack.directory / "stack.json").stat().st_mode & 0o777 == 0o600


def test_it_is_found_from_below_and_not_from_beside(stack, tmp_path):
    stacks.save(stack)
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert stacks.find(below) == stack
    assert stacks.load(tmp_path / "other") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "id": "x"}'])
def test_a_broken_file_is_named(stack, text):
    (stack.directory / "stack.json").write_text(text)
    with pytest.raises(EnvironmentUnusable, match=r"stack\.json cannot be read"):
        stacks.load(stack.directory)


def test_a_stack_with_one_process_is_not_running(stack):
    assert not stacks.running(stack)
    assert not stacks.running(replace(stack, ray_process=Identity(pid=2**22 + 1, start_ticks=1)))


def test_applying_it_takes_other_aws_settings_away(stack):
    environ = {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL_S3": "https://x", "NO_PROXY": "corp"}
    stack.apply_to(environ)
    assert {k for k in environ if k.startswith("AWS_")} == {k for k in stack.environment() if k.startswith("AWS_")}
    assert environ["HEADWAY_STORE"] == "s3://headway/main"
    assert environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert environ["NO_PROXY"] == "corp,127.0.0.1,127.0.0.2,localhost"


def test_the_marker_is_not_given_to_clients(stack):
    assert "HEADWAY_STACK" not in stack.environment()


def test_the_heads_environment(stack):
    base = {
        "PATH": "/usr/bin",
        "HOME": "/home/me",
        "RAY_ADDRESS": "1.2.3.4:6379",
        "AWS_PROFILE": "work",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    got = head_environment(base, marker="m", store=stack.store_environment(), temp_directory=Path("/tmp/headway-m"))
    assert got["HEADWAY_STACK"] == "m"
    assert got["SPT_NOENV"] == "1"
    assert got["PATH"].endswith(":/usr/bin")
    assert got["AWS_ACCESS_KEY_ID"] == "K"
    assert got["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert got["RAY_AUTH_MODE"] == "disabled"
    assert not {"RAY_ADDRESS", "AWS_PROFILE", "PYTHONDONTWRITEBYTECODE"} & set(got)
    chosen = head_environment({"RAY_AUTH_MODE": "token"}, marker="m", store={}, temp_directory=Path("/tmp/x"))
    assert chosen["RAY_AUTH_MODE"] == "token"


def test_the_heads_sockets_fit_into_107_bytes(stack):
    session = "session_2026-11-24_18-42-47_337417_4194304/sockets/plasma_store"
    assert len(str(stack.temp_directory / session)) <= 107
    command = head_command(ports=stack.ray_ports, temp_directory=stack.temp_directory, num_cpus=3)
    assert "--dashboard-host=127.0.0.1" in command
    assert "--num-cpus=3" in command


def test_the_file_holds_no_name_of_this_machine(stack):
    stacks.save(stack)
    text = (stack.directory / "stack.json").read_text()
    assert str(stack.directory) not in text
    assert json.loads(text)["processes"] == {"s3": {"pid": 10, "start_ticks": 20}}
