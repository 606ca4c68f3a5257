"""The command line where no server is needed: help, bad usage, bad run files, Ctrl-C, and what starting it costs."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orchestrator import __version__, cli
from orchestrator.starter import STARTER
from orchestrator.targets import stack as stacks
from orchestrator.targets.ray_head import RayPorts
from orchestrator.targets.seaweedfs import Keys, S3Ports
from tests.command_line import BIN, Said, environment, finish, headway, in_process, start

COMMANDS = ["demo", "up", "down", "doctor", "init", "schema", "plan", "run", "submit", "status", "logs", "stop"]
COMMANDS += ["list", "show", "report", "serve", "promote", "retrain", "rollback", "verify", "export", "dashboard"]
COMMANDS += ["prepare"]
HEAVY = ("ray", "torch", "deepspeed", "transformers")
HELP_LIMIT_S, PLAN_LIMIT_S = 0.3, 0.6
MAX_OF_LIBRARIES = 1.7
NUM_TIMED, NUM_SERIES = 5, 3

Cli = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, in an empty folder and without any settings."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return in_process(capsys)


def write_run_file(folder: Path, **changes: Any) -> Path:
    """The starter with top-level fields replaced."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(STARTER), **changes}))
    return path


# -- help and usage


def test_the_list_of_commands_is_whole() -> None:
    registered = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert sorted(name for name, command in registered.items() if not command.hidden) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_json(run: Cli, command: str) -> None:
    said = run(command, "--help").assert_done()
    assert f"Usage: headway {command}" in said.out
    assert "--json" in said.out
    assert said.err == ""


def test_alone_it_prints_its_help(run: Cli) -> None:
    said = run().assert_done()
    assert all(re.search(rf"^  {command} ", said.out, re.MULTILINE) for command in COMMANDS)


def test_version(run: Cli) -> None:
    assert run("--version").assert_done().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], ["'bogus'"]),
        (["lst"], ["'lst'", "list"]),
        (["plan", "run.yaml", "--bogus"], ["--bogus"]),
        (["plan"], ["run_file"]),
        (["plan", "a.yaml", "b.yaml"], ["b.yaml"]),
        (["submit", "run.yaml", "--timeout", "soon"], ["--timeout", "number"]),
        (["serve", "m", "--replicas", "0"], ["--replicas", "1"]),
        (["up", "--s3-port"], ["--s3-port"]),
        (["list", "pods"], ["'pods'", "runs, models, datasets, checkpoints"]),
        (["list", "checkpoints"], ["needs a run"]),
        (["prepare", "run.yaml", "--here", "--stop"], ["--detach, --stop and --here", "takes one"]),
        (["plan", "run.yaml", "--target", "nomad"], ["--target 'nomad'", "http://", "kubernetes:PATH"]),
        (["plan", "run.yaml", "--target", "kubernetes"], ["target settings at target.yaml", "target.example.yaml"]),
        (["plan", "run.yaml", "--target", "kubernetes:a.yaml"], ["target settings at a.yaml"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_usage(run: Cli, tmp_path: Path, arguments: list[str], words: list[str], as_json: bool) -> None:
    write_run_file(tmp_path, task="mine:Task")  # its size is not counted, which would start a child
    run(*arguments, *(["--json"] if as_json else [])).assert_refused(2, *words).assert_next_step()


# -- the run file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["run.yaml", "no run file"]),
        ("{name: [", ["run.yaml", "not YAML", "line 1"]),
        ("- a\n- b\n", ["holds list", "not a mapping"]),
        ("", ["NoneType", "not a mapping"]),
        (STARTER.replace("headway/v1", "headway/v9"), ["apiVersion", "'headway/v9'", "'headway/v1'"]),
        (STARTER + "\nname: twice\n", ["name is given twice", "line"]),
        (STARTER + "\nnmae: x\n", ["nmae", "no such field", "did you mean name"]),
        (STARTER.replace("steps: 200 ", "steps: 0 "), ["train.steps", "0 is refused", "at least 1"]),
        (STARTER.replace("stage: 2 ", "stage: 4 "), ["train.zero.stage", "4 is refused", "at most 3"]),
        (STARTER.replace("min: 1, max: 2", "min: 3, max: 2"), ["resources.workers", "min 3 is above max 2"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "submit", "prepare"])
def test_a_bad_run_file(run: Cli, tmp_path: Path, command: str, text: str | None, words: list[str]) -> None:
    if text is not None:
        assert text != STARTER
        (tmp_path / "run.yaml").write_text(text)
    run(command, "run.yaml", "--json").assert_refused(2, *words).assert_next_step()


def test_a_path_of_this_machine_is_not_sent_elsewhere(run: Cli, tmp_path: Path) -> None:
    write_run_file(tmp_path)
    for command in ("submit", "prepare"):
        said = run(command, "run.yaml", "--target", "http://127.0.0.1:1")
        said.assert_refused(2, "data.train", "data/**/*.txt").assert_next_step("s3://")


@pytest.mark.parametrize(("tokenizer", "refused"), [("/here/tokenizer.json", True), ("tokenizer.json", False)])
def test_a_tokenizer_is_sent_with_the_working_directory_or_not_at_all(
    run: Cli, tmp_path: Path, tokenizer: str, refused: bool
) -> None:
    write_run_file(tmp_path, data={"train": "s3://corpus/**", "tokenizer": tokenizer})
    said = run("prepare", "run.yaml", "--target", "http://127.0.0.1:1")
    assert said.code == 2
    assert ("data.tokenizer '/here/tokenizer.json' is a path of this machine" in said.err) == refused


def test_what_is_prepared_already_is_not_prepared(run: Cli, tmp_path: Path) -> None:
    write_run_file(tmp_path, data={"dataset": "code@0123456789abcdef"})
    said = run("prepare", "run.yaml", "--json")
    said.assert_refused(2, "data.dataset 'code@0123456789abcdef' is prepared already").assert_next_step("data.train")


def test_init_writes_once(run: Cli, tmp_path: Path) -> None:
    assert run("init", "mine.yaml", "--json").assert_done().json == {"path": "mine.yaml"}
    assert (tmp_path / "mine.yaml").read_text() == STARTER
    run("init", "mine.yaml").assert_refused(2, "mine.yaml exists already").assert_next_step("other.yaml")
    run("init", "no/such/mine.yaml").assert_refused(2, "no/such/mine.yaml", "No such file").assert_next_step()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_schema_is_json(run: Cli, flags: list[str]) -> None:
    assert run("schema", *flags).assert_done().json["properties"]["apiVersion"]["const"] == "headway/v1"


# -- no store, no stack


@pytest.mark.parametrize("command", [["list"], ["list", "models"], ["show", "code-lm"], ["status", "code-lm"]])
def test_without_a_store(run: Cli, command: list[str]) -> None:
    run(*command, "--json").assert_refused(2, "No store is set").assert_next_step("HEADWAY_STORE", "headway up")


@pytest.mark.parametrize("command", [["submit", "run.yaml"], ["logs", "r"], ["stop", "r"], ["serve", "m"]])
def test_without_a_stack(run: Cli, tmp_path: Path, command: list[str]) -> None:
    write_run_file(tmp_path)
    run(*command, "--json").assert_refused(4, "No embedded stack", str(tmp_path)).assert_next_step("headway up")


@pytest.mark.parametrize("command", [["submit", "run.yaml"], ["list"], ["show", "x"], ["logs", "r"]])
def test_a_stack_that_is_down(run: Cli, tmp_path: Path, command: list[str]) -> None:
    write_run_file(tmp_path)
    folder = tmp_path / ".headway"
    folder.mkdir()
    down = stacks.Stack(
        id="0123456789ab",
        directory=folder,
        keys=Keys(access_key="K", secret_key="S"),
        s3_ports=S3Ports(s3=8333, master=20000, volume=20001, filer=20002, admin=20003),
        ray_ports=RayPorts(gcs=6379, dashboard=8265, serve=8000, client=20004, agent=20005),
    )
    stacks.save(down)
    run(*command).assert_refused(4, str(folder), "does not run").assert_next_step("headway up")


def test_down_without_a_stack_is_no_fault(run: Cli, tmp_path: Path) -> None:
    assert run("down", "--json").assert_done().json == {
        "directory": str(tmp_path / ".headway"), "removed_data": False
    }  # fmt: skip
    assert not (tmp_path / ".headway").exists()


def test_a_folder_that_cannot_be_made(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run("up", "--directory", str(tmp_path / "file" / ".headway")).assert_refused(
        4, str(tmp_path / "file" / ".headway"), "Not a directory"
    ).assert_next_step("--directory")


# -- Ctrl-C


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c(tmp_path: Path, flags: list[str]) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    child = start("plan", "run.yaml", *flags, directory=tmp_path)
    with (tmp_path / "run.yaml").open("w"):  # returns once the command reads, and keeps it there
        child.send_signal(signal.SIGINT)
        finish(child).assert_refused(130, "Interrupted")


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    child = start("schema", directory=tmp_path)
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


# -- plan


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a run file whose model was counted before, and the settings that say so."""
    folder = tmp_path_factory.mktemp("warm")
    settings = {"HEADWAY_CACHE": str(folder / "cache")}
    write_run_file(folder)
    headway("plan", "run.yaml", directory=folder, settings=settings, timeout_s=300).assert_done()
    return folder, settings


def test_plan_says_the_same_in_text_and_json(warm: tuple[Path, dict[str, str]]) -> None:
    folder, settings = warm
    facts = headway("plan", "run.yaml", "--json", directory=folder, settings=settings).assert_done().json
    text = headway("plan", "run.yaml", directory=folder, settings=settings).assert_done().out
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())
    batch, size, memory = facts["batch"], facts["size"], facts["memory"]
    assert rows["workers"].startswith(f"{batch['world_size']}, each {facts['cpus_per_worker']} CPU")
    assert rows["steps"] == str(facts["num_steps"])
    rows_of = f"{batch['global_batch_size']} rows of {facts['sequence_length']} tokens"
    assert rows["global batch"] == f"{rows_of} = {facts['tokens_per_step']:,} tokens a step"
    assert rows["per worker"] == f"{batch['accumulation']} × {batch['micro_rows']} rows"
    assert rows["ZeRO"] == f"stage {facts['zero']['stage']}"
    assert rows["precision"] == facts["precision"]
    assert f"parameters              {size['num_parameters']:,}\n" in text
    assert rows["host memory per worker"].startswith(f"{memory['host_bytes'] / 2**30:.1f} GiB")
    for part in memory["parts"]:
        assert part["label"] in rows
    assert rows["memory"] == "fits"
    assert memory["fits"]


def test_help_is_quick(tmp_path: Path) -> None:
    assert_quick("--help", limit_s=HELP_LIMIT_S, libraries="typer", directory=tmp_path)


def test_plan_is_quick_on_a_warm_cache(warm: tuple[Path, dict[str, str]]) -> None:
    folder, settings = warm
    libraries = "typer, pydantic, boto3, httpx, yaml, numpy"
    assert_quick("plan", "run.yaml", limit_s=PLAN_LIMIT_S, libraries=libraries, directory=folder, settings=settings)


def assert_quick(
    *arguments: str, limit_s: float, libraries: str, directory: Path, settings: dict[str, str] | None = None
) -> None:
    """The median of a series is within the limit, or on a slow machine within a multiple of what an interpreter takes
    to import the libraries alone, in turns with it. Up to three series, since the machine may be busy during one."""
    seen: list[tuple[float, float]] = []
    while len(seen) < NUM_SERIES and not any(is_quick(*each, limit_s=limit_s) for each in seen):
        seen.append(medians_s(*arguments, libraries=libraries, directory=directory, settings=settings))
    told = ", ".join(f"{ours:.2f} ({bare:.2f})" for ours, bare in seen)
    print(f"headway {' '.join(arguments)}: medians of {NUM_TIMED} runs, s (its libraries alone): {told}")
    assert any(is_quick(*each, limit_s=limit_s) for each in seen), told


def is_quick(ours_s: float, libraries_s: float, *, limit_s: float) -> bool:
    return ours_s <= max(limit_s, MAX_OF_LIBRARIES * libraries_s)


def medians_s(*arguments: str, libraries: str, directory: Path, settings: dict[str, str] | None) -> tuple[float, float]:
    """Of the command, and of an interpreter that imports its libraries."""
    ours_s, bare_s = [], []
    for _ in range(NUM_TIMED):
        ours_s.append(wall_s([str(BIN / "headway"), *arguments], directory=directory, settings=settings))
        bare_s.append(wall_s([sys.executable, "-c", f"import {libraries}"], directory=directory, settings=settings))
    return statistics.median(ours_s), statistics.median(bare_s)


def wall_s(program: list[str], *, directory: Path, settings: dict[str, str] | None) -> float:
    """Of one run, started as cheaply as can be: a fork of this process, with torch in it, would alone take 0.15 s."""
    began_s = time.perf_counter()
    subprocess.run(program, cwd=directory, env=environment(**(settings or {})), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "run.yaml"]])
def test_nothing_heavy_is_imported(warm: tuple[Path, dict[str, str]], arguments: list[str]) -> None:
    folder, settings = warm
    program = (
        "import json, sys\n"
        "from orchestrator import cli\n"
        "assert cli.run(json.loads(sys.argv[1])) == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert "orchestrator" in imported
    assert imported.isdisjoint(HEAVY)
