"""Runs the files that CI systems run, the way that those do: their shell, their flags, their variables.

Of GitHub's expressions it knows what these files use: names of a context, ``||``, ``!=``, ``==`` and ``always()``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ACTION = ROOT / ".github" / "actions" / "retrain" / "action.yml"
EXAMPLES = ROOT / "docs" / "examples" / "ci"
WORKFLOW, GITLAB = EXAMPLES / "github-retrain.yml", EXAMPLES / "gitlab-retrain.yml"
SHELLS = {
    "bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail"],
    None: ["bash", "-e"],  # where a workflow's step names none
}
"""GitHub, "Workflow syntax", ``jobs.<job_id>.steps[*].shell``."""
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values, as GitHub and GitLab read them: ``on`` is a word."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(path.read_text(), Loader=_Loader)
    return found


# -- expressions


def evaluated(text: object, contexts: Mapping[str, Any]) -> str:
    """A value of the file with its ``${{ … }}`` replaced."""
    if isinstance(text, bool):
        return str(text).lower()
    return EXPRESSION.sub(lambda match: _text(_value(match[1], contexts)), str(text))


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _value(expression: str, contexts: Mapping[str, Any]) -> Any:
    if "||" in expression:
        first, _, rest = expression.partition("||")
        return _value(first.strip(), contexts) or _value(rest.strip(), contexts)
    for sign, is_equal in (("!=", False), ("==", True)):
        if sign in expression:
            left, _, right = expression.partition(sign)
            return (_value(left.strip(), contexts) == _value(right.strip(), contexts)) is is_equal
    if expression.startswith("'"):
        return expression.strip("'")
    found: Any = contexts
    for name in expression.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


# -- GitHub


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step came to."""

    name: str
    code: int
    log: str
    outputs: dict[str, str]
    summary: str

    @property
    def commands(self) -> list[str]:
        """The workflow commands among its lines, such as annotations."""
        return [line for line in self.log.splitlines() if line.startswith("::")]


def action_contexts(inputs: Mapping[str, str], *, python: Path) -> dict[str, Any]:
    """What the action's expressions see before its first script: its inputs, and the Python that was set up."""
    given = {name: inputs.get(name, about["default"]) for name, about in read(ACTION)["inputs"].items()}
    assert set(inputs) <= set(given)
    return {"inputs": given, "steps": {"python": {"outputs": {"python-path": str(python)}}}}


def action_step(name: str) -> dict[str, Any]:
    (found,) = [step for step in read(ACTION)["runs"]["steps"] if step["name"] == name]
    step: dict[str, Any] = found
    return step


@dataclass(frozen=True, kw_only=True)
class GitHubJob:
    """A job on a runner: its workspace, and a folder for the runner's own files."""

    workspace: Path
    temp: Path
    environ: Mapping[str, str]

    def action(self, inputs: Mapping[str, str], *, python: Path, skip: tuple[str, ...] = ()) -> dict[str, Step]:
        """Run the composite action. The steps that ran, by name.

        Args:
            python: what actions/setup-python finds.
            skip: names of steps that ran before.
        """
        contexts = action_contexts(inputs, python=python)
        ran: dict[str, Step] = {}
        for step in read(ACTION)["runs"]["steps"]:
            has_failed = any(each.code for each in ran.values())
            if "run" not in step or step["name"] in skip or (has_failed and step.get("if") != "always()"):
                continue
            done = self.step(step, contexts, GITHUB_ACTION_PATH=str(ACTION.parent))
            contexts["steps"][step.get("id", "")] = {"outputs": done.outputs}
            ran[done.name] = done
        return ran

    def step(self, step: Mapping[str, Any], contexts: Mapping[str, Any], **variables: str) -> Step:
        """Run one step's script exactly as it is written."""
        return self.finish(step, self.start(step, contexts, **variables))

    def start(self, step: Mapping[str, Any], contexts: Mapping[str, Any], **variables: str) -> subprocess.Popen[str]:
        files = {name: self.temp / name.lower() for name in ("SCRIPT", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for path in files.values():
            path.write_text("")
        script = files.pop("SCRIPT")
        script.write_text(step["run"])
        environ = {
            **self.environ,
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_TEMP": str(self.temp),
            **{name: str(path) for name, path in files.items()},
            **variables,
            **{name: evaluated(value, contexts) for name, value in step.get("env", {}).items()},
        }
        return subprocess.Popen(
            [*SHELLS[step.get("shell")], str(script)],
            cwd=self.workspace / evaluated(step.get("working-directory", "."), contexts),
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def finish(self, step: Mapping[str, Any], child: subprocess.Popen[str], *, said: str = "") -> Step:
        """Wait for a started step. ``said`` is what was read of its log before."""
        log, _ = child.communicate()
        lines = (line.partition("=") for line in (self.temp / "github_output").read_text().splitlines())
        return Step(
            name=step["name"],
            code=child.returncode,
            log=said + log,
            outputs={name: value for name, _, value in lines},
            summary=(self.temp / "github_step_summary").read_text(),
        )


# -- GitLab


def gitlab_script(job: Mapping[str, Any], *sections: str) -> str:
    """What GitLab's runner gives its shell: the lines of these sections, one after the other, in one shell."""
    return "\n".join(line for section in sections for line in job[section])


def run_gitlab(
    script: str, *, directory: Path, environ: Mapping[str, str], shell: str = "bash"
) -> subprocess.CompletedProcess[str]:
    """Run it with the runner's options: ``set -eo pipefail`` where the image has bash, else ``set -e``."""
    options = ["-eo", "pipefail"] if shell == "bash" else ["-e"]
    return subprocess.run(
        [shell, *options, "-c", script],
        cwd=directory,
        env={**environ, "CI": "true", "GITLAB_CI": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
