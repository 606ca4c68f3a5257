"""Tells in a GitHub job what `headway retrain --json` came to: an annotation, and the head of the job's summary.

Usage: tell.py ANSWER.json SUMMARY.md, with the variables of the action's step. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

USAGE_ERROR = 2
"""The exit code of a run file or a source that is not as it must be."""


def annotation(answer: Mapping[str, Any], told: Mapping[str, str]) -> str:
    """GitHub's workflow command for an answer (docs.github.com, "Workflow commands").

    Args:
        answer: what was printed: the result, or ``error``, ``next_step`` and ``exit_code``.
        told: the step's variables.
    """
    outcome = told.get("OUTCOME") or "error"
    properties = {"title": f"Headway: {outcome.replace('_', ' ')}"}
    if "error" not in answer:
        name = told.get("RUN_ID", "")
        version = f", {told['VERSION']}" if told.get("VERSION") else ""
        return command("notice", f"{name}{version}", properties)
    if answer.get("exit_code") == USAGE_ERROR:
        properties["file"] = os.path.normpath(
            os.path.join(told.get("INPUT_WORKING_DIRECTORY", ""), told.get("INPUT_RUN_FILE", ""))
        )
    next_step = f"\n→ {answer['next_step']}" if answer.get("next_step") else ""
    return command("error", f"{answer['error']}{next_step}", properties)


def command(name: str, message: str, properties: Mapping[str, str]) -> str:
    """One line; what would end it, or a property, is escaped as the runner's own toolkit does."""
    shown = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{name} {shown}::{_escaped(message, '')}"


def _escaped(text: str, also: str) -> str:
    return "".join(f"%{ord(letter):02X}" if letter in f"%\r\n{also}" else letter for letter in text)


def summary(answer: Mapping[str, Any], told: Mapping[str, str]) -> str:
    """Markdown: which run, what became of it, and why. The report follows it."""
    lines = [f"## {told.get('RUN_ID') or told.get('INPUT_RUN_FILE', '')}: {told.get('OUTCOME') or 'error'}", ""]
    if "error" in answer:
        # Indented, so that nothing in it is markup.
        said = [*str(answer["error"]).splitlines(), *([f"→ {answer['next_step']}"] if answer.get("next_step") else [])]
        lines += [*(f"    {line}" for line in said), ""]
    changed = answer.get("changed") or {}
    if changed:
        lines += [f"Changed since {answer.get('previous')}:", ""]
        lines += [f"    {line}" for what, how in changed.items() for line in f"{what}: {how}".splitlines()] + [""]
    return "\n".join(lines) + "\n"


def main(answer_file: str, summary_file: str) -> None:
    text = Path(answer_file).read_text(encoding="utf-8").strip()
    unsaid = {"error": "headway retrain ended without a word; its log has more.", "exit_code": 1}
    answer = json.loads(text) if text else unsaid
    sys.stdout.write(annotation(answer, os.environ) + "\n")
    with Path(summary_file).open("a", encoding="utf-8") as file:
        file.write(summary(answer, os.environ))


if __name__ == "__main__":
    main(*sys.argv[1:])
