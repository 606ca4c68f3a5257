"""Ray and an S3 server on this machine, under one folder: bringing them up, taking them down.

Both are started at once and outlive the caller. The stack's file is written before the first process starts, and
every process carries the stack's id. So what an interrupted ``up`` left is ended by the next ``up`` or ``down``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import ports as machine_ports
from orchestrator.targets import processes, ray_head, seaweedfs
from orchestrator.targets.ray_head import RayPorts
from orchestrator.targets.stack import BUCKET, Stack, load, running, save, stack_id

Say = Callable[[str], None]
_START_TIMEOUT_S = 90.0
_END_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What a person may choose. None takes the default, and another port where the default is taken.

    People have to know the dashboard's and Serve's ports, so those are never replaced silently.
    """

    dashboard_port: int = ray_head.DEFAULT_DASHBOARD_PORT
    serve_port: int = ray_head.DEFAULT_SERVE_PORT
    ray_port: int | None = None
    s3_port: int | None = None
    num_cpus: int | None = None


def up(directory: Path, options: StackOptions, say: Say) -> Stack:
    """Bring up the stack of the ``.headway`` folder ``directory``, or find it up already.

    Raises:
        EnvironmentUnusable: a port is taken, a program is missing, or one did not start. Nothing is left running.
    """
    directory = directory.resolve()
    with _usable(directory), _locked(directory, say):
        before = load(directory)
        if before is not None and running(before):
            say(f"Already up: dashboard {before.dashboard_url}")
            return before
        if processes.marked(stack_id(directory)):
            say("Ending what is left of an earlier stack here")
            _end(directory, before)
        stack = _plan(directory, options, before)
        save(stack)
        try:
            started = _start(stack, options, say)
            save(started)
            return started
        except BaseException:
            with processes.uninterrupted():
                _end(directory, stack)
            raise


def down(directory: Path, say: Say, *, remove_data: bool = False) -> None:
    """End everything of the stack: both servers, jobs, workers, replicas. Data, keys and ports stay for another ``up``.

    A job that runs is ended at once; its run goes on from its last checkpoint.
    """
    directory = directory.resolve()
    if not directory.is_dir():
        say("Nothing to end: there is no stack here")
        return
    with _usable(directory), _locked(directory, say):
        stack = load(directory)
        num_left = len(processes.marked(stack_id(directory)))
        say(f"Ending {num_left} processes" if num_left else "Nothing was running")
        with processes.uninterrupted():
            _end(directory, stack)
        if remove_data:
            shutil.rmtree(directory)
            say(f"Removed {directory}")


def _plan(directory: Path, options: StackOptions, before: Stack | None) -> Stack:
    """Decide ids, keys and ports. Those of before are kept where they are free and nothing else was asked for."""
    name = stack_id(directory)
    seed = int(name, 16)
    last = before.ray_ports if before else None
    machine_ports.require_free(options.dashboard_port, what="Ray's dashboard", flag="--dashboard-port")
    machine_ports.require_free(options.serve_port, what="Ray Serve", flag="--serve-port")
    if options.ray_port is not None:
        machine_ports.require_free(options.ray_port, what="Ray's GCS", flag="--ray-port")
    s3_ports = seaweedfs.choose_ports(seed=seed, s3=options.s3_port, prefer=before.s3_ports if before else None)
    taken = [options.dashboard_port, options.serve_port, *s3_ports.all()]
    for port in {options.dashboard_port, options.serve_port, options.ray_port} & set(s3_ports.all()):
        raise EnvironmentUnusable(
            f"Port {port} is asked for twice: by Ray and by the S3 server (port, or port + {seaweedfs.GRPC_OFFSET}).",
            next_step="Choose others with --dashboard-port, --serve-port, --ray-port, --s3-port.",
        )
    if options.ray_port is not None:
        gcs = options.ray_port
    else:
        wished = [last.gcs] if last else [ray_head.DEFAULT_GCS_PORT]
        gcs = machine_ports.choose(wished, taken=taken, seed=seed)
    client = machine_ports.choose([last.client] if last else [], taken=[*taken, gcs], seed=seed)
    agent = machine_ports.choose([last.agent] if last else [], taken=[*taken, gcs, client], seed=seed)
    return Stack(
        id=name,
        directory=directory,
        keys=before.keys if before else seaweedfs.new_keys(),
        s3_ports=s3_ports,
        ray_ports=RayPorts(
            gcs=gcs, dashboard=options.dashboard_port, serve=options.serve_port, client=client, agent=agent
        ),
    )


def _start(stack: Stack, options: StackOptions, say: Say) -> Stack:
    """Start both servers side by side and wait for both."""
    began_s = time.monotonic()
    stack.logs.mkdir(exist_ok=True)
    say("Starting Ray and the S3 server")
    ray_log = stack.logs / "ray.log"
    temp_directory = _own_temp_directory(stack)
    ray = ray_head.start_head(
        ports=stack.ray_ports,
        temp_directory=temp_directory,
        num_cpus=options.num_cpus or ray_head.default_num_cpus(),
        environment=ray_head.head_environment(
            os.environ, marker=stack.id, store=stack.store_environment(), temp_directory=temp_directory
        ),
        log=ray_log,
    )
    s3 = seaweedfs.start_s3(
        stack.data,
        ports=stack.s3_ports,
        keys=stack.keys,
        marker=stack.id,
        environment=os.environ,
        log=stack.logs / "s3.log",
    )
    seaweedfs.wait_for_s3(s3)
    seaweedfs.create_bucket(s3, BUCKET)
    seaweedfs.wait_until_it_stores(s3, BUCKET, stack.store_environment())
    say(f"S3 server up at {s3.endpoint_url}")
    if not processes.wait_until(
        lambda: ray_head.is_ready(stack.ray_ports), timeout_s=_START_TIMEOUT_S, ended=lambda: ray.poll() is not None
    ):
        how = (
            f"did not answer within {_START_TIMEOUT_S:.0f} s" if ray.poll() is None else f"ended with code {ray.poll()}"
        )
        raise EnvironmentUnusable(
            f"Ray {how}; its last words:\n  {processes.log_tail(ray_log)}\n", next_step=f"Read {ray_log}"
        )
    say(f"Ray up in {time.monotonic() - began_s:.1f} s: dashboard {stack.dashboard_url}")
    started = replace(stack, s3_process=processes.identity(s3.process.pid), ray_process=processes.identity(ray.pid))
    if not running(started):
        raise EnvironmentUnusable("A server ended as soon as it was up.", next_step=f"Read {stack.logs}")
    return started


def _end(directory: Path, stack: Stack | None) -> None:
    """End all processes of the folder's stack and take away what they left outside it."""
    marker = stack_id(directory)
    # The S3 server goes last, so that what still writes to it can finish.
    server = {stack.s3_process} if stack and stack.s3_process else set()
    processes.end(marker, grace_s=_END_GRACE_S, but_for=frozenset(filter(None, server)))
    processes.end(marker, grace_s=seaweedfs.STOP_GRACE_S)
    shutil.rmtree(f"/tmp/headway-{marker}", ignore_errors=True)
    if stack is not None:
        seaweedfs.remove_sockets(stack.s3_ports)
        save(replace(stack, s3_process=None, ray_process=None))


def _own_temp_directory(stack: Stack) -> Path:
    path = stack.temp_directory
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise EnvironmentUnusable(f"{path} belongs to another user.", next_step="Ask them to take it away.")
    return path


def _keep_out_of_git(directory: Path) -> None:
    """The folder holds keys: git is told to ignore it, whatever the project around it says."""
    ignore = directory / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")


@contextlib.contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Makes the folder; whatever the system refuses from then on is said of it.

    Raises:
        EnvironmentUnusable: it cannot be written, or its disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _keep_out_of_git(directory)
        yield
    except OSError as e:
        raise EnvironmentUnusable(
            f"The stack's folder {directory} cannot be used: {e.strerror or e}.",
            next_step="Free some space there, or choose another folder with headway up --directory.",
        ) from e


@contextlib.contextmanager
def _locked(directory: Path, say: Say) -> Iterator[None]:
    """One ``up`` or ``down`` at a time; a second one waits."""
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another headway command that works on this stack")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
