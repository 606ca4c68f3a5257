"""Bad days, through the command line on one embedded stack: what is killed, stopped, refused or full, and what then.

The tests go in order. Each asks its runs what became of them in the store, as another person would.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.checkpoint.catalog import committed, committed_steps, find
from orchestrator.errors import EnvironmentUnusable
from orchestrator.record import EventReader
from orchestrator.release.download import download_files
from orchestrator.release.outcome import read_outcome
from orchestrator.release.versions import VersionFile
from orchestrator.store import Store, layout, open_store
from orchestrator.store.attempts import newest_attempt
from orchestrator.targets import ports, processes
from orchestrator.targets import stack as stacks
from orchestrator.targets.stack import Stack
from tests.command_line import Said, finish, headway, start
from tests.small_disk import small_disk
from tests.tiny_run import TINY_LLAMA

RUN_TIMEOUT_S = 300.0  # half a minute where nothing else runs: it ends what hangs, and measures nothing
AT_ONCE_S = 20.0  # what needs no job, on a machine that is busy; half a second on one that is idle
STEPS = 12
SLOW_STEPS, EVERY = 240, 8
NAN_STEP = 6
NUM_FILES, FILE_BYTES = 40, 3000
CORPUS = "s3://headway/corpus"

NAN_TASK = f"""
from workloads.tasks.causal_lm import CausalLM


class NanTask(CausalLM):
    num_steps = 0

    def loss_sum(self, model, batch):
        self.num_steps += 1
        loss = super().loss_sum(model, batch)
        return loss * float("nan") if self.num_steps == {NAN_STEP} else loss
"""
SLOW_TASK = """
import time
from pathlib import Path

from workloads.tasks.causal_lm import CausalLM


class SlowTask(CausalLM):
    def loss_sum(self, model, batch):
        if not Path({fast!r}).exists():
            time.sleep(0.25)
        return super().loss_sum(model, batch)
"""


@dataclass(frozen=True, kw_only=True)
class Days:
    """A project's folder with a stack in it, and the store seen from here."""

    directory: Path
    flags: tuple[str, ...]
    """Of ``headway up``: ports that nobody else uses."""
    store: Store

    @property
    def stack(self) -> Stack:
        found = stacks.load(self.directory / ".headway")
        assert found is not None
        return found

    @property
    def fast(self) -> Path:
        """While this file is there, the slow task does not wait."""
        return self.directory / "fast"

    def headway(self, *arguments: str, timeout_s: float = RUN_TIMEOUT_S) -> Said:
        began_s = time.monotonic()
        said = headway(*arguments, directory=self.directory, timeout_s=timeout_s)
        print(f"headway {' '.join(arguments)}: exit {said.code} after {time.monotonic() - began_s:.1f} s")
        return said

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start(*arguments, directory=self.directory)

    def write(self, name: str, **changes: Any) -> str:
        """The run file of a tiny model on the dataset ``clean``. Returns its name."""
        document: dict[str, Any] = {
            "apiVersion": "headway/v1",
            "name": name,
            "model": {"architecture": TINY_LLAMA},
            "data": {"dataset": "clean", "sequence_length": 32},
            "train": {
                "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "zero": {"stage": 2},
                "optimizer": {"learning_rate": 1e-3},
            },
            "checkpoint": {"every_steps": 4},
            "gate": {"max_eval_samples": 64},
            **changes,
        }  # fmt: skip
        (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(document))
        return f"{name}.yaml"

    def write_slow(self, name: str, *, workers: int, gate: dict[str, Any]) -> str:
        train = {"steps": SLOW_STEPS, "global_batch_size": 8, "micro_batch_size": 8, "zero": {"stage": 2}}
        return self.write(
            name,
            task="slow_task:SlowTask",
            train=train,
            checkpoint={"every_steps": EVERY},
            resources={"workers": {"min": workers, "max": workers}},
            gate={"max_eval_samples": 64, **gate},
        )

    def events(self, run_id: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in EventReader(self.store, run_id).poll() if event["kind"] == kind]

    def wait_for_training(self, run_id: str, *, attempt: int, group: int) -> list[dict[str, Any]]:
        """Wait until so many groups of an attempt, from 1, have begun to train. Returns what they said of it."""

        def begun() -> list[dict[str, Any]]:
            return [event for event in self.events(run_id, "training") if event["attempt"] == attempt]

        wait_for(lambda: len(begun()) >= group, f"group {group} of attempt {attempt} of {run_id}")
        return begun()

    def run_of(self, name: str) -> str:
        (run_id,) = [run for run in self.store.list_folders("runs/") if run.rpartition("-")[0] == name]
        return run_id

    def wait_for_commit(self, name: str, *, above: int, attempt: int) -> int:
        """Wait until an attempt that trains has committed a step above ``above``. Returns the newest step."""

        def committed() -> int:
            if not any(run.startswith(f"{name}-") for run in self.store.list_folders("runs/")):
                return 0
            run_id = self.run_of(name)
            if newest_attempt(self.store, run_id) < attempt:
                return 0
            return max(committed_steps(self.store, run_id), default=0)

        wait_for(lambda: committed() > above, f"a checkpoint of {name} above step {above}")
        return committed()

    def end_of_job(self, submission_id: str) -> str:
        """Ray's word for how a job ended, once it has."""
        states: list[str] = []

        def ended() -> bool:
            url = f"{self.stack.dashboard_url}/api/jobs/{submission_id}"
            details = httpx.get(url, trust_env=False, timeout=60).json()
            states.append(details["status"])
            return states[-1] in ("SUCCEEDED", "FAILED", "STOPPED")

        wait_for(ended, f"the end of job {submission_id}")
        return states[-1]


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = RUN_TIMEOUT_S) -> None:
    began_s = time.monotonic()
    if not processes.wait_until(condition, timeout_s=timeout_s, ended=lambda: False):
        raise AssertionError(f"{what} did not come within {timeout_s:.0f} s")
    print(f"{what} after {time.monotonic() - began_s:.1f} s")


def attached(watching: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """The same, once it watches a job in flight: one that came later than a kill would submit the next attempt."""
    assert watching.stderr is not None
    said = watching.stderr.readline()
    assert "attached" in said, said
    return watching


def kill(stack: Stack, *words: str) -> None:
    """SIGKILL the one process of the stack whose command holds all of ``words``."""
    found = [each for each in processes.marked(stack.id) if all(w in processes.command_line(each.pid) for w in words)]
    assert found, [processes.command_line(each.pid) for each in processes.marked(stack.id)]
    os.kill(max(found, key=lambda each: each.pid).pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Days]:
    directory = tmp_path_factory.mktemp("days")
    (directory / "nan_task.py").write_text(NAN_TASK)
    (directory / "slow_task.py").write_text(SLOW_TASK.format(fast=str(directory / "fast")))
    seed = secrets.randbits(32)
    dashboard = ports.choose([], taken=[], seed=seed)
    serve = ports.choose([], taken=[dashboard], seed=seed)
    flags = ("--dashboard-port", str(dashboard), "--serve-port", str(serve))
    try:
        headway("up", *flags, directory=directory, timeout_s=RUN_TIMEOUT_S).assert_done()
        found = stacks.load(directory / ".headway")
        assert found is not None
        with pytest.MonkeyPatch.context() as patch:
            environ = dict(os.environ)
            found.apply_to(environ)
            for name in os.environ.keys() - environ.keys():
                patch.delenv(name)
            for name, value in environ.items():
                patch.setenv(name, value)
            store = open_store()
            put_corpus(store.at(store.bucket, "corpus"))
            yield Days(directory=directory, flags=flags, store=store)
    finally:
        headway("down", directory=directory).assert_done()


def put_corpus(place: Store) -> None:
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(2, 7))) for _ in range(60)]
    for number in range(NUM_FILES):
        text = " ".join(words.choices(vocabulary, k=FILE_BYTES // 5))
        place.upload(f"{number:03d}.txt", text.encode())


# -- a good day first: what follows rests on its dataset


def test_up_again_is_no_fault(days: Days) -> None:
    said = days.headway("up", *days.flags, "--json").assert_done()
    assert said.json["dashboard"] == days.stack.dashboard_url
    assert "Already up" in said.err


@pytest.fixture(scope="module")
def clean(days: Days) -> dict[str, Any]:
    """A run that went well: what ``plan --manifests`` printed before, and what ``submit`` printed."""
    run_file = days.write(
        "clean",
        data={"train": f"{CORPUS}/**/*.txt", "vocab_size": 300, "eval_fraction": 0.2, "sequence_length": 32},
        release={"model": "clean-lm"},
    )
    planned = days.headway("plan", run_file, "--manifests").assert_done().json
    return {"planned": planned, **days.headway("submit", run_file, "--json").assert_done().json}


def test_a_run_ends_done(days: Days, clean: dict[str, Any]) -> None:
    assert (clean["state"], clean["attempt"], clean["attached"]) == ("done", 1, False)
    facts = clean["facts"]
    assert (facts["steps"], facts["version"]) == (STEPS, "clean-lm@1")
    assert 0 < facts["evaluation"]["loss"] < 7
    assert facts["checkpoint"] == days.store.uri_of(find(days.store, clean["run_id"], STEPS).prefix).rstrip("/")
    assert committed_steps(days.store, clean["run_id"]) == [12, 8, 4]


def test_what_plan_printed_is_what_was_sent(days: Days, clean: dict[str, Any]) -> None:
    planned = clean["planned"]
    assert planned["submission_id"] == clean["submission_id"]
    url = f"{days.stack.dashboard_url}/api/jobs/{clean['submission_id']}"
    answer = httpx.get(url, trust_env=False, timeout=60).json()
    assert {name: answer[name] for name in planned} == planned


def test_a_finished_run_is_told_at_once(days: Days, clean: dict[str, Any]) -> None:
    said = days.headway("submit", "clean.yaml", "--json", timeout_s=AT_ONCE_S).assert_done()
    assert said.json == {**{k: v for k, v in clean.items() if k != "planned"}, "submission_id": "", "attached": True}
    assert "is done already" in said.err
    assert newest_attempt(days.store, clean["run_id"]) == 1


def test_it_is_seen_by_every_command(days: Days, clean: dict[str, Any]) -> None:
    run_id = clean["run_id"]
    status = days.headway("status", run_id, "--json").assert_done().json
    assert (status["state"], status["attempts"], status["last_step"]["step"]) == ("done", 1, STEPS)
    logs = days.headway("logs", "clean", "--json").assert_done().json
    assert f"{run_id} is done: clean-lm@1" in logs["log"]
    assert f"{run_id}: attempt 1" in days.headway("logs", "-f", "clean").assert_done().out
    assert [row["run"] for row in days.headway("list", "--json").assert_done().json["runs"]] == [run_id]
    assert days.headway("show", "clean-lm@1", "--json").assert_done().json["run_id"] == run_id
    stopped = days.headway("stop", run_id, "--json").assert_done().json
    assert stopped == {"run_id": run_id, "state": "done"}


# -- bad input that only the run itself can tell


def test_what_the_run_file_asks_for_does_not_exist(days: Days, clean: dict[str, Any]) -> None:
    llama = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "task": ({"task": "nope"}, ("task", "'nope'", "causal-lm")),
        "type": ({"model": {"architecture": {"model_type": "nope", **llama}}}, ("model_type", "no such architecture")),
        "field": (
            {"model": {"architecture": {"model_type": "llama", **llama, "hiden_size": 64}}},
            ("model.architecture.hiden_size", "did you mean hidden_size"),
        ),
    }
    children = {
        name: days.start("submit", days.write(f"bad-{name}", **changes), "--json")
        for name, (changes, _) in cases.items()
    }
    for name, child in children.items():
        said = finish(child, timeout_s=RUN_TIMEOUT_S).assert_refused(2, *cases[name][1]).assert_next_step()
        assert "ray" not in said.json["error"].lower()


# -- a loss that is no number


def test_a_loss_that_is_no_number_ends_the_run_for_good(days: Days, clean: dict[str, Any]) -> None:
    run_file = days.write("nan", task="nan_task:NanTask")
    days.headway("submit", run_file, "--json").assert_refused(1, f"at step {NAN_STEP}", "nan", "learning_rate")
    run_id = days.run_of("nan")
    outcome = read_outcome(days.store, run_id)
    assert outcome is not None
    assert (outcome.state, outcome.attempt) == ("failed", 1)
    assert f"step {NAN_STEP}" in outcome.reason
    assert committed_steps(days.store, run_id) == [4]
    again = days.headway("submit", run_file, "--json", timeout_s=AT_ONCE_S)
    again.assert_refused(1, f"at step {NAN_STEP}")
    assert newest_attempt(days.store, run_id) == 1


@pytest.mark.full
def test_a_damaged_last_checkpoint_is_trained_again(days: Days, clean: dict[str, Any]) -> None:
    run_file = days.write("damaged")
    run_id = days.headway("submit", run_file, "--json").assert_done().json["run_id"]
    damaged = find(days.store, run_id, STEPS)
    # As if the job had died before the export, and the store lost a bit after that.
    days.store.delete([layout.export(run_id), layout.evaluation(run_id), layout.outcome(run_id)])
    key = f"{damaged.prefix}rank-00000.safetensors"
    data = bytearray(days.store.get(key))
    data[len(data) // 6] ^= 1  # in the first third, the master weights, which are all that an export reads
    days.store.upload(key, bytes(data))
    days.headway("verify", f"damaged@{STEPS}").assert_refused(1, f"{run_id}@{STEPS}")

    done = days.headway("submit", run_file, "--json").assert_done().json
    assert done["attempt"] == 2
    assert [event["first_step"] for event in days.events(run_id, "training")] == [0, STEPS - 4]
    newer = find(days.store, run_id, STEPS)
    assert newer > damaged
    assert done["facts"]["checkpoint"] == days.store.uri_of(newer.prefix).rstrip("/")
    assert {folder for folder in committed(days.store, run_id) if folder.step == STEPS} == {newer, damaged}  # pinned


# -- Ctrl-C, a time-out, a stop, and the gate


@pytest.mark.full
def test_watching_ends_and_the_run_goes_on_and_is_stopped(days: Days, clean: dict[str, Any]) -> None:
    run_file = days.write_slow("stopped", workers=1, gate={"max_loss": 0.01})
    watching = days.start("submit", run_file, "--json")
    seen = days.wait_for_commit("stopped", above=0, attempt=1)
    watching.send_signal(signal.SIGINT)
    finish(watching, timeout_s=AT_ONCE_S).assert_refused(130, "No longer watching", "it goes on").assert_next_step(
        "headway stop stopped-"
    )
    attached = days.headway("submit", run_file, "--timeout", "1", "--json")
    attached.assert_refused(5, "not done after 1 s").assert_next_step("headway logs -f")
    assert "attached" in attached.err
    days.wait_for_commit("stopped", above=seen, attempt=1)

    said = days.headway("stop", "stopped", "--json").assert_done().json
    run_id = said["run_id"]
    assert said["state"] == "stopped"
    (step, *_) = committed_steps(days.store, run_id)
    assert f"stopped at step {step} of {SLOW_STEPS}: headway stop" in said["reason"]
    assert days.headway("status", "stopped", "--json").assert_done().json["state"] == "stopped"
    assert days.headway("stop", "stopped", "--json").assert_done().json["state"] == "idle"

    days.fast.touch()
    refused = days.headway("submit", run_file, "--json")
    days.fast.unlink()
    refused.assert_refused(3, "refused by the gate", "gate.max_loss 0.01")
    assert [event["first_step"] for event in days.events(run_id, "training")] == [0, step]
    assert f"resumed at step {step}" in refused.err


@pytest.mark.full
def test_the_gates_word_stands(days: Days, clean: dict[str, Any]) -> None:
    said = days.headway("submit", "stopped.yaml", "--json", timeout_s=AT_ONCE_S)
    said.assert_refused(3, "refused by the gate", "gate.max_loss 0.01")
    assert newest_attempt(days.store, days.run_of("stopped")) == 2


# -- one run through everything that can be killed


def test_a_killed_worker_costs_no_more_than_since_the_last_commit(days: Days, clean: dict[str, Any]) -> None:
    run_file = days.write_slow("killed", workers=2, gate={})
    sent = days.headway("submit", run_file, "--detach", "--json").assert_done().json
    step = days.wait_for_commit("killed", above=EVERY, attempt=1)
    kill(days.stack, "TrainWorker")
    first, second = days.wait_for_training(sent["run_id"], attempt=1, group=2)
    days.wait_for_commit("killed", above=second["first_step"] + EVERY, attempt=1)
    saved, done = (
        [event["step"] for event in days.events(sent["run_id"], kind) if event["time_s"] < second["time_s"]]
        for kind in ("checkpoint", "step")
    )
    assert second["first_step"] >= max([step, *saved])
    assert step > first["first_step"]
    assert done[-1] - second["first_step"] <= 2 * EVERY  # a save runs behind training until the next
    assert newest_attempt(days.store, sent["run_id"]) == 1


def test_a_killed_driver_means_the_next_attempt(days: Days, clean: dict[str, Any]) -> None:
    run_id = days.run_of("killed")
    watching = attached(days.start("submit", "killed.yaml", "--json"))
    step = days.wait_for_commit("killed", above=max(committed_steps(days.store, run_id)), attempt=1)
    kill(days.stack, "python", "headway run killed.yaml")
    finish(watching, timeout_s=RUN_TIMEOUT_S).assert_refused(1, run_id, "without an outcome").assert_next_step(
        "headway logs", "Submit it again"
    )
    assert days.end_of_job(f"{run_id}-00001") == "FAILED"

    sent = days.headway("submit", "killed.yaml", "--detach", "--json").assert_done().json
    assert sent["submission_id"] == f"{run_id}-00002"
    (resumed,) = days.wait_for_training(run_id, attempt=2, group=1)
    assert resumed["first_step"] >= step
    days.wait_for_commit("killed", above=resumed["first_step"] + EVERY, attempt=2)
    assert days.wait_for_training(run_id, attempt=2, group=1) == [resumed]


@pytest.mark.full
def test_a_store_that_hangs_for_a_while_is_waited_for(days: Days, clean: dict[str, Any]) -> None:
    run_id = days.run_of("killed")
    (step, *_) = committed_steps(days.store, run_id)
    server = days.stack.s3_process
    assert server is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        time.sleep(4.0)  # the outage itself, over a commit or two
    finally:
        os.kill(server.pid, signal.SIGCONT)
    days.wait_for_commit("killed", above=step + EVERY, attempt=2)
    assert len([event for event in days.events(run_id, "training") if event["attempt"] == 2]) == 1


@pytest.mark.full
def test_a_killed_store_loses_nothing_that_was_committed(days: Days, clean: dict[str, Any]) -> None:
    run_id = days.run_of("killed")
    watching = attached(days.start("submit", "killed.yaml", "--json"))
    (before, *_) = committed_steps(days.store, run_id)
    step = days.wait_for_commit("killed", above=before, attempt=2)
    server = days.stack.s3_process
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: not processes.alive(server), "the end of the S3 server")
    days.headway("list", "--json").assert_refused(4, "does not run").assert_next_step("headway up")
    days.headway("submit", "killed.yaml", "--json").assert_refused(4, "does not run").assert_next_step("headway up")

    days.headway("up", *days.flags, "--json").assert_done()
    finish(watching, timeout_s=RUN_TIMEOUT_S).assert_refused(1, run_id, "no longer knows its job").assert_next_step(
        "Submit it again"
    )
    assert committed_steps(days.store, run_id)[0] >= step

    days.fast.touch()
    done = days.headway("submit", "killed.yaml", "--json").assert_done().json
    days.fast.unlink()
    assert (done["state"], done["attempt"], done["facts"]["steps"]) == ("done", 3, SLOW_STEPS)
    resumed = [event["first_step"] for event in days.events(run_id, "training") if event["attempt"] == 3]
    assert [first >= step for first in resumed] == [True]


# -- no stack


def test_after_down_nothing_is_left_and_the_next_up_knows_it_all(days: Days, clean: dict[str, Any]) -> None:
    days.headway("down", "--json").assert_done()
    assert processes.marked(days.stack.id) == []
    assert not days.stack.temp_directory.exists()
    for command in (["submit", "clean.yaml"], ["logs", "clean"], ["list"]):
        days.headway(*command, "--json").assert_refused(4, "does not run").assert_next_step("headway up")
    days.headway("down", "--json").assert_done()

    days.headway("up", *days.flags, "--json").assert_done()
    said = days.headway("submit", "clean.yaml", "--json", timeout_s=AT_ONCE_S).assert_done()
    assert (said.json["run_id"], said.json["attached"]) == (clean["run_id"], True)
    gone = days.headway("logs", "clean", "--json").assert_refused(4, clean["run_id"])
    gone.assert_next_step("forgets its jobs")


# -- a machine that lacks something


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB without a free byte."""
    with small_disk(tmp_path, 64 * 2**10):
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "filler").write_bytes(bytes(2**20))
        yield tmp_path


def test_a_stack_on_a_full_disk(full_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = full_disk / ".headway"
    said = headway("up", "--directory", folder, "--json", directory=elsewhere)
    said.assert_refused(4, str(folder), "No space left").assert_next_step("Free some space", "--directory")
    assert processes.marked(stacks.stack_id(folder)) == []
    headway("init", full_disk / "run.yaml", directory=elsewhere).assert_refused(4, "run.yaml", "No space left")
    assert not (full_disk / "run.yaml").exists()


def test_a_cache_on_a_full_disk(days: Days, full_disk: Path) -> None:
    data = random.Random(0).randbytes(2**20)
    days.store.upload("large", data)
    files = {"large": VersionFile(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
    with pytest.raises(EnvironmentUnusable, match="No space left") as caught:
        download_files(days.store, "", files, full_disk / "model")
    assert str(full_disk / "model") in caught.value.message
    assert "HEADWAY_CACHE" in caught.value.next_step
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


def test_no_compiler(tmp_path: Path) -> None:
    said = headway("doctor", "--json", directory=tmp_path, settings={"PATH": str(tmp_path), "CXX": ""})
    assert said.code == 4
    assert "compiler" in said.json["failed"]
    (check,) = [each for each in said.json["checks"] if each["name"] == "compiler"]
    assert "there is no c++" in check["detail"]
    assert "g++" in check["next_step"]
    text = headway("doctor", directory=tmp_path, settings={"PATH": str(tmp_path), "CXX": ""})
    assert text.code == 4
    assert "FAIL  compiler" in text.out
