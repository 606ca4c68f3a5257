"""A real S3 server and an embedded stack for the session, a small Ray for a module, a fresh store for each test."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.store import Store, open_store
from orchestrator.targets import local, ports, seaweedfs
from orchestrator.targets.seaweedfs import S3Server
from orchestrator.targets.stack import Stack

BUCKET = "headway-tests"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server; ``AWS_…`` in the environment lead to it, also for child processes."""
    directory, keys = tmp_path_factory.mktemp("s3"), seaweedfs.new_keys()
    server = seaweedfs.start_s3(
        directory / "data",
        ports=seaweedfs.choose_ports(seed=secrets.randbits(32)),
        keys=keys,
        marker="headway-tests",
        environment=os.environ,
        log=directory / "s3.log",
    )
    try:
        seaweedfs.wait_for_s3(server)
        seaweedfs.create_bucket(server, BUCKET)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
            patch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
            patch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
            patch.setenv("AWS_REGION", "us-east-1")
            seaweedfs.wait_until_it_stores(server, BUCKET, os.environ)
            yield server
    finally:
        seaweedfs.stop_s3(server)


@pytest.fixture
def store(s3: S3Server) -> Store:
    return open_store(f"s3://{BUCKET}/{secrets.token_hex(6)}")


@pytest.fixture(scope="module")
def ray_of_two(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray of two CPUs; without the server there would be nothing for its tasks to read."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else ray.init leaves a token mode in this process's environment
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            namespace="headway-tests",
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An embedded stack on ports that no other uses, under a folder of its own. It leaves this process's environment
    alone: child processes get :func:`stack_environment`."""
    directory = tmp_path_factory.mktemp("stack") / ".headway"
    seed = secrets.randbits(32)
    dashboard = ports.choose([], taken=[], seed=seed)
    serve = ports.choose([], taken=[dashboard], seed=seed)
    # Two workers, and a CPU for what is served meanwhile, as an embedded stack has by itself.
    options = local.StackOptions(dashboard_port=dashboard, serve_port=serve, num_cpus=3)
    try:
        yield local.up(directory, options, lambda _: None)
    finally:
        local.down(directory, lambda _: None)


@pytest.fixture(scope="session")
def stack_environment(stack: Stack) -> dict[str, str]:
    """The whole environment of a child process that works with :func:`stack`; its PATH leads to headway and ray."""
    environ = {name: value for name, value in os.environ.items() if name != "HEADWAY_STACK"}
    stack.apply_to(environ)
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    return environ
