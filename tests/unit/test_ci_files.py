"""The CI files: well formed, pinned, of least right, and closed to what their inputs may hold."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from orchestrator import cli
from orchestrator.spec import load
from orchestrator.target_settings import load_settings
from tests.ci_files import ACTION, EXPRESSION, GITLAB, ROOT, WORKFLOW, evaluated, gitlab_script, read

COMPONENT = ROOT / "k8s" / "components" / "retrain"
COMMANDS: Any = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def steps(path: Path) -> list[dict[str, Any]]:
    document = read(path)
    if path == ACTION:
        found: list[dict[str, Any]] = document["runs"]["steps"]
        return found
    return [step for job in document["jobs"].values() for step in job["steps"]]


def flags(name: str) -> set[str]:
    """Of a command of Headway's."""
    return {flag for option in COMMANDS[name].params for flag in option.opts}


def scripts() -> Iterator[tuple[str, str]]:
    for path in (ACTION, WORKFLOW):
        yield from ((step["name"], step["run"]) for step in steps(path) if "run" in step)
    yield "gitlab", gitlab_script(read(GITLAB)["retrain"], "before_script", "script")


# -- GitHub


@pytest.mark.parametrize("path", [ACTION, WORKFLOW], ids=lambda path: path.stem)
def test_other_peoples_actions_are_pinned_by_commit_and_say_their_version(path: Path) -> None:
    for step in steps(path):
        used = step.get("uses", "")
        if used and not used.startswith("OWNER/headway/"):
            assert PINNED.fullmatch(used), used
            assert re.search(rf"{re.escape(used)} # v\d+\.\d+\.\d+$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [ACTION, WORKFLOW], ids=lambda path: path.stem)
def test_nothing_is_put_into_a_script(path: Path) -> None:
    """What an input holds reaches a shell as a variable's value, never as its text."""
    for step in steps(path):
        assert not EXPRESSION.search(step.get("run", "")), step["name"]
        assert ("run" in step) != ("uses" in step)
        assert path != ACTION or "run" not in step or step["shell"] == "bash"


@pytest.mark.parametrize(("name", "script"), list(scripts()), ids=lambda value: value.split("\n")[0][:20])
def test_a_script_is_one_that_bash_reads(name: str, script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), name


def test_an_expression_names_an_input_or_a_step_that_there_is() -> None:
    document, found = read(ACTION), steps(ACTION)
    names = {f"inputs.{name}" for name in document["inputs"]}
    names |= {f"steps.{step['id']}.outputs" for step in found if "id" in step}
    used = EXPRESSION.findall(ACTION.read_text())
    assert used
    for each in used:
        assert each in names or each.rpartition(".")[0] in names, each
    assert all("description" in about and "default" in about for about in document["inputs"].values())


def test_the_workflow_gives_the_action_what_it_takes_and_reads_what_it_gives() -> None:
    action = read(ACTION)
    (used,) = [step for step in steps(WORKFLOW) if step.get("uses", "").startswith("OWNER/headway/")]
    assert set(used["with"]) <= set(action["inputs"])
    assert used["uses"].partition("@")[0].removeprefix("OWNER/headway/") == str(ACTION.parent.relative_to(ROOT))
    read_outputs = set(re.findall(r"steps\.retrain\.outputs\.([\w-]+)", WORKFLOW.read_text()))
    assert read_outputs <= set(action["outputs"])


@pytest.mark.parametrize(
    ("github", "inputs", "wanted"),
    [
        ("schedule", {}, {"run-file": "run.yaml", "fresh": "false", "wait": "true"}),
        ("push", {}, {"run-file": "run.yaml", "fresh": "false", "wait": "true"}),
        (
            "workflow_dispatch",
            {"run-file": "b.yaml", "fresh": True, "wait": False},
            {"run-file": "b.yaml", "fresh": "true", "wait": "false"},
        ),
    ],
)
def test_each_trigger_gives_the_action_its_inputs(github: str, inputs: dict[str, Any], wanted: dict[str, str]) -> None:
    (used,) = [step for step in steps(WORKFLOW) if step.get("id") == "retrain"]
    given = {
        name: evaluated(value, {"github": {"event_name": github}, "inputs": inputs})
        for name, value in used["with"].items()
    }
    assert wanted.items() <= given.items()


def test_the_workflow_asks_for_little_and_cancels_nothing() -> None:
    document = read(WORKFLOW)
    assert document["permissions"] == {"contents": "read", "id-token": "write"}
    assert document["concurrency"]["cancel-in-progress"] is False
    assert set(document["on"]) == {"schedule", "push", "workflow_dispatch"}
    (job,) = document["jobs"].values()
    (wait,) = [int(step["with"]["timeout"]) for step in job["steps"] if step.get("id") == "retrain"]
    assert wait < job["timeout-minutes"] * 60 - 600
    (login,) = [step for step in job["steps"] if "role-to-assume" in step.get("with", {})]
    assert login["with"]["role-duration-seconds"] > wait


# -- what the action tells


@pytest.fixture(scope="module")
def tell() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tell", ACTION.parent / "tell.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_result_is_a_notice(tell: ModuleType) -> None:
    told = {"OUTCOME": "done", "RUN_ID": "demo-1a2b3c4d", "VERSION": "demo@3"}
    assert tell.annotation({"outcome": "done"}, told) == "::notice title=Headway%3A done::demo-1a2b3c4d, demo@3"
    assert tell.annotation({}, {**told, "OUTCOME": "unchanged", "VERSION": ""}).endswith("::demo-1a2b3c4d")


def test_an_error_is_an_annotation_of_one_line(tell: ModuleType) -> None:
    answer = {"error": "run.yaml has 2 faults:\n  a: 100%\r\n  b", "next_step": "See docs", "exit_code": 1}
    assert tell.annotation(answer, {"OUTCOME": "timed_out"}) == (
        "::error title=Headway%3A timed out::run.yaml has 2 faults:%0A  a: 100%25%0D%0A  b%0A→ See docs"
    )


def test_a_bad_run_file_is_named_as_the_file(tell: ModuleType) -> None:
    answer = {"error": "no", "exit_code": 2}
    told = {"OUTCOME": "error", "INPUT_RUN_FILE": "run,1.yaml", "INPUT_WORKING_DIRECTORY": "models"}
    assert "file=models/run%2C1.yaml::no" in tell.annotation(answer, told)


def test_nothing_that_a_message_holds_is_a_command_or_markup(tell: ModuleType) -> None:
    answer = {"error": "no\n::set-output name=a::b\n# heading", "exit_code": 1}
    assert "\n" not in tell.annotation(answer, {})
    lines = tell.summary(answer, {"RUN_ID": "demo-1", "OUTCOME": "failed"}).splitlines()
    assert lines[0] == "## demo-1: failed"
    assert lines[2:5] == ["    no", "    ::set-output name=a::b", "    # heading"]


def test_the_summary_says_what_changed(tell: ModuleType) -> None:
    answer = {"previous": "demo-0", "changed": {"train.steps": "1 → 2"}}
    assert "Changed since demo-0:\n\n    train.steps: 1 → 2\n" in tell.summary(answer, {})


def test_an_answer_that_was_never_written_is_told(
    tell: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "answer").write_text("")
    tell.main(str(tmp_path / "answer"), str(tmp_path / "summary"))
    assert capsys.readouterr().out.startswith("::error title=Headway%3A error::headway retrain ended without a word")
    (tmp_path / "answer").write_text(json.dumps({"outcome": "done"}))
    tell.main(str(tmp_path / "answer"), str(tmp_path / "summary"))
    assert (tmp_path / "summary").read_text().count("## ") == 2


# -- flags


def test_the_flags_are_those_of_the_command() -> None:
    used = {flag for _, script in scripts() for flag in re.findall(r"(?<![\w-])--[a-z-]+", script)}
    others = {"--without-pip", "--python", "--quiet", "--disable-pip-version-check", "--name", "--kubeconfig"}
    assert used - others <= flags("retrain") | flags("report")
    assert used >= {"--wait", "--timeout", "--fresh", "--stop-on-cancel", "--outputs", "--json", "--target", "--store"}


# -- GitLab


def test_gitlab_hands_on_what_came_out_whatever_it_was() -> None:
    job = read(GITLAB)["retrain"]
    artifacts = job["artifacts"]
    assert artifacts["when"] == "always"
    script = gitlab_script(job, "script")
    for name in (artifacts["reports"]["dotenv"], *artifacts["paths"]):
        assert name in script
    assert job["allow_failure"] == {"exit_codes": [5]}
    assert job["interruptible"] is True


@pytest.mark.skipif(shutil.which("dash") is None, reason="an image without bash has another shell, such as this")
def test_gitlabs_script_needs_no_bash() -> None:
    script = gitlab_script(read(GITLAB)["retrain"], "before_script", "script")
    done = subprocess.run(["dash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_gitlabs_token_lies_outside_of_what_is_sent() -> None:
    text = gitlab_script(read(GITLAB)["retrain"], "before_script")
    assert 'AWS_WEB_IDENTITY_TOKEN_FILE="$CI_BUILDS_DIR/aws-token"' in text
    assert "umask 077" in text


# -- Kubernetes


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPONENT / name).read_text()))


def test_every_file_of_the_component_is_used() -> None:
    (said,) = objects("kustomization.yaml")
    assert said["kind"] == "Component"
    used = set(said["resources"])
    for made in said["configMapGenerator"]:
        assert made["namespace"] == "headway"
        used |= {*made.get("files", ()), *made.get("envs", ())}
    assert {path.name for path in COMPONENT.iterdir()} == used | {"kustomization.yaml"}


def test_the_components_run_file_and_target_fit_each_other() -> None:
    spec, settings = load(COMPONENT / "run.yaml"), load_settings(COMPONENT / "target.yaml")
    assert spec.resources.gpu == "any"
    assert any(pool.gpus_per_pod for pool in settings.pools.values())


def test_the_cron_job_submits_as_a_submitter_and_may_do_no_more() -> None:
    account, binding = objects("account.yaml")
    (cron_job,) = objects("cronjob.yaml")
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]
    assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == "headway-submitter"
    (policy,) = objects("network.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == {443, 6443}


def test_the_cron_job_runs_one_at_a_time_restricted() -> None:
    (cron_job,) = objects("cronjob.yaml")
    assert cron_job["spec"]["concurrencyPolicy"] == "Forbid"
    job = cron_job["spec"]["jobTemplate"]["spec"]
    (_, rule) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["values"]) == (container["name"], [1, 2, 3, 130])
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    assert job["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["command"][2:]) & {"run.yaml"}
    assert {flag for flag in container["command"] if flag.startswith("--")} <= flags("retrain")


def test_the_images_are_those_of_headway_and_have_what_the_cron_job_needs() -> None:
    (cron_job,) = objects("cronjob.yaml")
    (container,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == load_settings(COMPONENT / "target.yaml").image
    assert "--extra kubernetes" in (ROOT / "k8s" / "image" / "Containerfile").read_text()
