"""The programs of a pod as processes, against a real S3 server: what they store and fetch is whole, whatever dies."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import __version__
from orchestrator.package import package
from orchestrator.record.logs import LogReader, list_files
from orchestrator.store import Store, claim_attempt, layout
from orchestrator.store.attempts import POD_ENDS, end_attempt, stop_reason
from orchestrator.store.code import upload_code

RUN, POD, JOB = "demo-1a2b3c4d", "demo-head", "demo-1a2b3c4d-00001"
SESSION = "session_2026-01-01_00-00-00_000000_1"
DRIVER = f"job-driver-{JOB}.log"
DEADLINE_S = 120.0
MOST_AHEAD_BYTES = 8 * 2**20

SHIP = """
import sys
from pathlib import Path
from orchestrator.commands.pod import ship_logs
from orchestrator.reporter import Reporter
run, root, pod, timeout, store = sys.argv[1:]
reporter = Reporter()
reporter.result(*ship_logs(run, root=Path(root), pod=pod, timeout_s=float(timeout), store_uri=store, reporter=reporter))
"""
FETCH = """
import sys
from pathlib import Path
from orchestrator.commands.pod import fetch_code
digest, to, version, store = sys.argv[1:]
fetch_code(digest=digest, to=Path(to), version=version, store_uri=store)
assert not {"ray", "torch", "transformers", "kubernetes"} & set(sys.modules)
"""
STOP = """
import sys
from orchestrator.commands.pod import save_and_stop
from orchestrator.reporter import Reporter
run, job, timeout, store = sys.argv[1:]
reporter = Reporter()
reporter.result(*save_and_stop(run, job=job, pod=None, timeout_s=float(timeout), store_uri=store, reporter=reporter))
"""


def program(code: str, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ or dict(os.environ),
        cwd=Path(__file__).parents[2],
    )


@contextmanager
def shipper(
    store: Store, root: Path, *, timeout_s: float = DEADLINE_S, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    process = program(SHIP, RUN, str(root), POD, str(timeout_s), store.uri, environ=environ)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, f"{what} did not come within {DEADLINE_S:.0f} s"
        time.sleep(0.05)


def ended(process: subprocess.Popen[str], with_signal: int = signal.SIGTERM) -> str:
    """What it said, once the signal has ended it well."""
    process.send_signal(with_signal)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def logs_of(root: Path) -> Path:
    logs = root / SESSION / "logs"
    (logs / "serve").mkdir(parents=True)
    return logs


def stored(store: Store) -> dict[str, bytes]:
    return {
        file.name: b"".join(store.get(file.chunk(RUN, n + 1)) for n in range(file.num_chunks))
        for file in list_files(store, RUN)
    }


def on_disk(logs: Path) -> dict[str, bytes]:
    return {path.relative_to(logs).as_posix(): path.read_bytes() for path in logs.rglob("*.*") if path.stat().st_size}


def num_chunks(store: Store) -> int:
    return sum(file.num_chunks for file in list_files(store, RUN))


class Writer(threading.Thread):
    """Writes lines into log files, as fast as a busy program, until it is told to stop. It waits where more than
    :data:`MOST_AHEAD_BYTES` are not stored yet, so that the rest does not grow with the time that a shipper takes."""

    def __init__(self, logs: Path, store: Store) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.paths = [logs / DRIVER, logs / "worker-1.out", logs / "serve" / "replica.log"]
        self.done = threading.Event()

    def run(self) -> None:
        num_bytes, most_bytes = 0, MOST_AHEAD_BYTES
        while not self.done.wait(0.01):
            if num_bytes > most_bytes:
                most_bytes = MOST_AHEAD_BYTES + sum(file.size_bytes for file in list_files(self.store, RUN))
                continue
            for path in self.paths:
                line = secrets.token_hex(random.randrange(1, 16_000)).encode() + b" \xe2\x82\xac\n"
                with path.open("ab") as file:
                    num_bytes += file.write(line)

    def stop(self) -> None:
        self.done.set()
        self.join(DEADLINE_S)


def test_growing_logs_arrive_live_and_whole_once_the_pod_ends(store: Store, tmp_path: Path) -> None:
    logs = logs_of(tmp_path)
    (logs / DRIVER).write_text("first line\n")
    reader = LogReader(store, RUN)
    follower = reader.follow(JOB)
    with shipper(store, tmp_path) as process:
        seen: list[str] = []
        until(lambda: bool(seen.extend(follower.poll()) or seen), "the first line")
        assert "".join(seen) == "first line\n"
        writer = Writer(logs, store)
        writer.start()
        until(lambda: num_chunks(store) > 12, "a dozen chunks")
        writer.stop()
        (logs / "raylet.err").write_text("last words")
        assert "All logs are stored." in ended(process)
    assert stored(store) == on_disk(logs)
    seen.extend(follower.finish())
    assert "".join(seen) == (logs / DRIVER).read_text()
    (driver,) = reader.driver_log(JOB)
    assert "".join(reader.read(driver)) == (logs / DRIVER).read_text()


def test_a_shipper_that_is_killed_again_and_again_loses_and_repeats_nothing(store: Store, tmp_path: Path) -> None:
    logs = logs_of(tmp_path)
    writer = Writer(logs, store)
    writer.start()
    for killed in (True, True, True, True, False):
        before = num_chunks(store)
        with shipper(store, tmp_path) as process:
            until(lambda before=before: num_chunks(store) > before + 2, "new chunks")  # type: ignore[misc]
            if not killed:
                writer.stop()
                ended(process, signal.SIGINT)
    assert stored(store) == on_disk(logs)


def test_a_store_that_swallows_requests_does_not_hold_up_the_end(store: Store, tmp_path: Path) -> None:
    (logs_of(tmp_path) / DRIVER).write_text("a line\n")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        environ = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with shipper(store, tmp_path, timeout_s=2.0, environ=environ) as process:
            silent.accept()[0].recv(1)  # it runs, and waits for an answer
            started = time.monotonic()
            assert "Not all logs could be stored within 2 s." in ended(process)
            assert time.monotonic() - started < 8.0


def test_code_gets_from_a_working_directory_into_a_pod(store: Store, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "tasks").mkdir(parents=True)
    (work / "tasks" / "mine.py").write_text("x = 'ä'\n")
    (work / "weights.bin").write_bytes(secrets.token_bytes(20 * 2**20))  # so that it goes up by parts
    packed = package(work)
    for _ in range(2):
        upload_code(store, digest=packed.digest, data=packed.data)
    assert [item.key for item in store.list("code/")] == [layout.code(packed.digest)]
    for version, code in ((__version__, 0), (__version__, 0), ("9.9.9", 1)):
        process = program(FETCH, packed.digest, str(tmp_path / "code"), version, store.uri)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, output
    assert "9.9.9" in output
    assert __version__ in output
    assert package(tmp_path / "code").digest == packed.digest


def test_a_pod_that_ends_has_its_attempt_save(store: Store) -> None:
    attempt = claim_attempt(store, RUN, facts={"job": JOB})
    process = program(STOP, RUN, JOB, str(DEADLINE_S), store.uri)
    until(lambda: stop_reason(store, attempt) == POD_ENDS, "the request to stop")
    end_attempt(store, attempt, state="stopped", reason="saved at step 7")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert f"Attempt 1 of {RUN} ended (stopped): saved at step 7" in output


@pytest.mark.parametrize("uri", ["s3://no-such-bucket-anywhere/x", "not an address"])
def test_a_pre_stop_hook_never_fails(store: Store, uri: str) -> None:
    process = program(STOP, RUN, JOB, "0", uri)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
